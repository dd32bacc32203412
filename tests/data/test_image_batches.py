"""Samples of images: their order, crops and flips, and an evaluation that scores each once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from images_run import prepare_digits

from vqmoe_megatron.config import VisionConfig
from vqmoe_megatron.data.datasets import TrainBatches
from vqmoe_megatron.data.image_batches import EvaluationImages, TrainingImages, augmented
from vqmoe_megatron.data.image_set import load_image_set

CROP_FLIP = VisionConfig(image_size=8, crop_padding=2, random_flip=True)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):  # noqa: ANN001, ANN201
    return load_image_set(prepare_digits(tmp_path_factory.mktemp("images")))


def test_every_pass_reads_every_image_once_in_another_order(digits) -> None:  # noqa: ANN001
    samples = TrainingImages(digits, VisionConfig(image_size=8), seed=5, num_samples=3 * 1258)
    passes = [[samples.image_of(1258 * e + s) for s in range(1258)] for e in range(3)]
    assert all(sorted(read) == list(range(1258)) for read in passes)
    assert passes[0] != passes[1] != passes[2]
    longer = TrainingImages(digits, VisionConfig(image_size=8), seed=5, num_samples=10**6)
    assert [longer.image_of(s) for s in range(1258)] == passes[0]
    other = TrainingImages(digits, VisionConfig(image_size=8), seed=6, num_samples=1258)
    assert [other.image_of(s) for s in range(1258)] != passes[0]


def test_samples_do_not_depend_on_ranks_or_microbatches(digits) -> None:  # noqa: ANN001
    samples = TrainingImages(digits, CROP_FLIP, seed=5, num_samples=64)

    def read(size: int, ranks: int, consumed: int = 0) -> torch.Tensor:
        batches = [iter(TrainBatches(samples, consumed, size, r, ranks)) for r in range(ranks)]
        number = (64 - consumed) // (size * ranks)
        return torch.cat([next(b)["images"] for _ in range(number) for b in batches])

    whole = read(16, 1)
    assert torch.equal(read(4, 4), whole) and torch.equal(read(8, 2, 16), whole[16:])
    assert whole.dtype == torch.float32 and whole.shape == (64, 1, 8, 8)


def test_pixels_are_normalized_by_the_train_split(digits) -> None:  # noqa: ANN001
    samples = TrainingImages(digits, VisionConfig(image_size=8), seed=5, num_samples=1258)
    read = torch.stack([samples[s]["images"] for s in range(1258)]).double()
    assert abs(read.mean()) < 1e-5 and abs(read.std(unbiased=False) - 1) < 1e-5
    number = samples.image_of(7)
    pixels = digits.split("train").images[number].astype(np.float64) / 255
    wanted = (pixels - digits.channel_mean) / digits.channel_std
    assert np.allclose(samples[7]["images"].numpy().transpose(1, 2, 0), wanted, atol=1e-6)
    assert samples[7]["labels"] == digits.split("train").labels[number]


def test_a_crop_is_a_shift_and_every_second_one_is_mirrored() -> None:
    image = np.random.default_rng(1).integers(1, 256, (8, 8, 3), np.uint8)
    seen, mirrored = set(), 0
    for sample in range(400):
        found = augmented(image, CROP_FLIP, 3, sample)
        assert np.array_equal(found, augmented(image, CROP_FLIP, 3, sample))
        matches = [
            (top, left, flip)
            for top in range(-2, 3)
            for left in range(-2, 3)
            for flip in (False, True)
            if np.array_equal(found, shifted(image, top, left, flip))
        ]
        assert len(matches) == 1
        seen.add(matches[0][:2])
        mirrored += matches[0][2]
    assert len(seen) == 25 and 150 < mirrored < 250
    assert augmented(image, VisionConfig(image_size=8), 3, 0) is image


def shifted(image: np.ndarray, top: int, left: int, flip: bool) -> np.ndarray:
    """The oracle: pixel by pixel, zeros from outside."""
    height, width, _ = image.shape
    out = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            if 0 <= row + top < height and 0 <= column + left < width:
                target = width - 1 - column if flip else column
                out[row, target] = image[row + top, column + left]
    return out


@pytest.mark.parametrize(("size", "ranks", "most"), [(7, 3, 10**6), (16, 1, 100), (64, 2, 359)])
def test_an_evaluation_scores_every_chosen_image_once(digits, size, ranks, most) -> None:  # noqa: ANN001
    split, scored = digits.split("test"), []
    for rank in range(ranks):
        batches = EvaluationImages(digits, "test", 16, size, rank, ranks, most)
        read = list(batches)
        assert len(read) == len(batches) == -(-min(359, most) // (size * ranks))
        for batch in read:
            assert batch["images"].shape == (size, 1, 8, 8)
            keep = batch["loss_mask"] > 0
            scored += [
                (image.numpy().tobytes(), int(label))
                for image, label in zip(batch["images"][keep], batch["labels"][keep], strict=True)
            ]
    chosen = np.arange(min(359, most)) * 359 // min(359, most)
    wanted = EvaluationImages(digits, "test", 16, 1, 0, 1, most).normalized(split.images[chosen])
    labels = split.labels[chosen]
    assert sorted(scored) == sorted(
        (image.tobytes(), int(label)) for image, label in zip(wanted, labels, strict=True)
    )
