"""Microbatches of images: training samples in an exactly resumable order, and an evaluation split.

1. Sample s of a run is image ``order(e)[s mod n]`` of the n training images, in pass e = s div n;
   ``order(e)`` is a permutation drawn from (seed, e). So a longer run has the same beginning.
2. Crop and flip are drawn from (seed, s), so they depend on neither layout nor workers.
3. ``TrainBatches`` deals samples to data-parallel ranks, as those of text.
4. Pixels become fp32: (pixel / 255 - mean) / std, by channel, with figures of the train split.

Shapes: b = micro_batch_size, C channels, P image_size. Images are ``[b, C, P, P]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from vqmoe_megatron.config import VisionConfig
from vqmoe_megatron.data.image_set import ImageSet

# Keys of the generators, so that one seed never draws both the order and a crop.
ORDER_KEY, AUGMENTATION_KEY = 1, 2


class TrainingImages(torch.utils.data.Dataset):
    """Samples 0 .. num_samples - 1 of a run; ``num_samples`` may be many passes."""

    def __init__(self, images: ImageSet, vision: VisionConfig, seed: int, num_samples: int) -> None:
        split = images.split("train")
        self.vision, self.seed, self.num_samples = vision, seed, num_samples
        self.normalized = Normalization(images)
        self.pixels, self.labels = split.images, split.labels
        self._order: tuple[int, np.ndarray] | None = None  # of the pass read last

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        number = self.image_of(sample)
        pixels = augmented(self.pixels[number], self.vision, self.seed, sample)
        return {
            "images": torch.from_numpy(self.normalized(pixels[None])[0]),
            "labels": torch.tensor(int(self.labels[number])),
        }

    def image_of(self, sample: int) -> int:
        """Number of the sample's image."""
        number, position = divmod(sample, len(self.labels))
        if self._order is None or self._order[0] != number:
            generator = np.random.default_rng((ORDER_KEY, self.seed, number))
            self._order = number, generator.permutation(len(self.labels))
        return int(self._order[1][position])


def augmented(pixels: np.ndarray, vision: VisionConfig, seed: int, sample: int) -> np.ndarray:
    """Crop and flip uint8 ``[P, P, C]`` as the recipe says, drawn from (seed, sample)."""
    if not (vision.crop_padding or vision.random_flip):
        return pixels
    generator = np.random.default_rng((AUGMENTATION_KEY, seed, sample))
    top, left = generator.integers(0, 2 * vision.crop_padding + 1, size=2)
    is_flipped = generator.integers(0, 2) == 1
    if padding := vision.crop_padding:
        height, width = pixels.shape[:2]
        padded = np.pad(pixels, ((padding, padding), (padding, padding), (0, 0)))
        pixels = padded[top : top + height, left : left + width]
    return pixels[:, ::-1] if vision.random_flip and is_flipped else pixels


class Normalization:
    """uint8 ``[n, P, P, C]`` to fp32 ``[n, C, P, P]`` of mean 0 and spread 1 over the train
    split."""

    def __init__(self, images: ImageSet) -> None:
        mean, std = np.array(images.channel_mean), np.array(images.channel_std)
        self.scale = (1 / (255 * std)).astype(np.float32)
        self.shift = (-mean / std).astype(np.float32)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """A new array, contiguous."""
        values = pixels.astype(np.float32) * self.scale + self.shift
        return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


class EvaluationImages:
    """Iterate over the images of one data-parallel rank, as microbatches with a ``loss_mask``.

    Microbatch m of rank r holds the chosen images ``(m * D + r) * b + [0, b)``; every rank yields
    ``len(self)`` of them, the last filled up with images whose mask is zero. ``max_images``
    chooses that many, spread evenly over the split. Iterating again starts over. Does not
    communicate.
    """

    def __init__(
        self,
        images: ImageSet,
        split: str,
        seq_length: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        max_images: int,
    ) -> None:
        self.seq_length, self.micro_batch_size = seq_length, micro_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.split = images.split(split)
        self.normalized = Normalization(images)
        self.num_images = min(self.split.num_images, max_images)
        self._chosen = np.arange(self.num_images) * self.split.num_images // self.num_images
        self._pixels, self._labels = self.split.images, self.split.labels

    @property
    def description(self) -> str:
        """What is scored, for reports."""
        return f"{self.num_images} of {self.split.num_images} images of {self.split.name}"

    def __len__(self) -> int:
        return math.ceil(self.num_images / (self.micro_batch_size * self.dp_size))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for number in range(len(self)):
            first = (number * self.dp_size + self.dp_rank) * self.micro_batch_size
            chosen = self._chosen[first : first + self.micro_batch_size]
            # Filled up with the first image, which is not scored there.
            rows = np.resize(chosen if len(chosen) else self._chosen[:1], self.micro_batch_size)
            yield {
                "images": torch.from_numpy(self.normalized(self._pixels[rows])),
                "labels": torch.from_numpy(self._labels[rows]),
                "loss_mask": (torch.arange(self.micro_batch_size) < len(chosen)).float(),
            }
