"""The ``vision`` section of a recipe: images in the place of text.

An image is cut into square patches, and every patch is one position of the sequence: there is no
class token, the classes are read from the mean over all positions.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqmoe_megatron.config.checks import check_settings, settled


@dataclass
class VisionConfig:
    """What a model of images reads, with ``train.task=images``; of text, all of it is unused."""

    image_size: int | None = None  # pixels, of height and width; None: a model of text
    patch_size: int = 4  # pixels, of height and width
    num_channels: int = 3  # 1: grey; 3: red, green, blue
    num_classes: int = 10  # outputs of the classification head
    crop_padding: int = 0  # pixels of zeros around a training image that is cropped back; 0: none
    random_flip: bool = False  # every second training image is mirrored left to right

    def __post_init__(self) -> None:
        check_settings("vision", self)
        if self.image_size is not None and self.image_size % self.patch_size:
            raise ValueError(
                f"vision.image_size % vision.patch_size != 0: {self.image_size} % "
                f"{self.patch_size} = {self.image_size % self.patch_size}; patches cover the image"
            )

    @property
    def is_on(self) -> bool:
        """Whether the model reads images."""
        return self.image_size is not None

    @property
    def in_words(self) -> str:
        """What is read, and what is answered; of a model of images only."""
        image, patch = (f"{size} x {size}" for size in (self.image_size, self.patch_size))
        return (
            f"images of {image} x {self.num_channels} in {self.num_patches} patches of {patch}, "
            f"{self.num_classes} classes from their mean"
        )

    @property
    def num_patches(self) -> int:
        """S, positions of the sequence; of a model of images only."""
        return (settled(self.image_size, "vision.image_size") // self.patch_size) ** 2

    @property
    def patch_width(self) -> int:
        """Numbers of one patch: C P P."""
        return self.num_channels * self.patch_size**2
