"""A tiny vision transformer for tests: its overrides of the parity recipe, and its images."""

from __future__ import annotations

from pathlib import Path

# Of recipes/parity.yaml: 8 x 8 digits in patches of 2, so 16 positions.
VISION = [
    "train.task=images",
    "vision.image_size=8",
    "vision.patch_size=2",
    "vision.num_channels=1",
    "vision.num_classes=10",
    "vision.crop_padding=1",
    "model.seq_length=16",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.position_embedding_type=learned_absolute",
    "model.init_method_std=0.1",
]


def prepare_digits(folder: Path) -> Path:
    """The digits of the installed scikit-learn, prepared."""
    from vqmoe_megatron.data.prepare_images import prepare_images

    return prepare_images("digits", folder / "digits", []).path
