"""Images from where they are published: which go where, pixel by pixel, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from images_run import cifar_folder, write_records

from vqmoe_megatron.data.image_sources import CIFAR_NAMES, folder_split, open_images
from vqmoe_megatron.data.prepare_images import prepare_images

RECORD_BYTES = 3073


def test_digits_are_split_by_the_stated_rule() -> None:
    from sklearn.datasets import load_digits

    published, source = load_digits(), open_images("digits", [], None)
    assert source.num_images == {"train": 1258, "valid": 180, "test": 359}
    wanted = {"train": [], "valid": [], "test": []}
    for number in range(1797):
        split = "test" if number % 5 == 4 else "valid" if number % 10 == 3 else "train"
        wanted[split].append(number)
    for split, numbers in wanted.items():
        found = list(source.read[split]())
        assert [label for _, label in found] == published.target[numbers].tolist()
        pixels = np.stack([image[..., 0] for image, _ in found])
        assert np.abs(pixels * (16 / 255) - published.images[numbers]).max() < 0.04
    assert {image.dtype for image, _ in found} == {np.dtype(np.uint8)}


def test_cifar_records_are_read_as_documented(tmp_path: Path) -> None:
    folder, train, test = cifar_folder(tmp_path / "cifar")
    images = prepare_images("cifar10", tmp_path / "out", [folder])
    assert images.class_names == CIFAR_NAMES and (images.image_size, images.num_channels) == (32, 3)
    sizes = {name: split.num_images for name, split in images.splits.items()}
    assert sizes == {"train": 18, "valid": 2, "test": 4}
    for split, pixels in (("train", train[:18]), ("valid", train[18:]), ("test", test)):
        found = images.split(split).images
        for colour in range(3):
            assert np.array_equal(found[..., colour], pixels[:, colour])
    assert images.split("test").labels.tolist() == [3, 1, 4, 1]
    shares = train[:18].astype(np.float64) / 255
    assert np.allclose(images.channel_mean, shares.mean(axis=(0, 2, 3)))
    assert np.allclose(images.channel_std, shares.std(axis=(0, 2, 3)))


def test_files_that_are_not_of_cifar10_are_refused(tmp_path: Path) -> None:
    folder, *_ = cifar_folder(tmp_path / "cifar")
    with (folder / "data_batch_2.bin").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ValueError, match=f"no whole number of records of {RECORD_BYTES}"):
        prepare_images("cifar10", tmp_path / "out", [folder])
    write_records(folder / "data_batch_2.bin", [3, 10])
    with pytest.raises(ValueError, match="has label 10, CIFAR-10 has 10 classes"):
        prepare_images("cifar10", tmp_path / "out", [folder])
    (folder / "test_batch.bin").unlink()
    with pytest.raises(ValueError, match=r"lacks data_batch_\*\.bin or test_batch\.bin"):
        prepare_images("cifar10", tmp_path / "out", [folder])
    assert not (tmp_path / "out").exists()


def write_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (12, 8)) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_a_folder_of_classes_with_its_own_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_image(tmp_path / "in" / split / "red" / "a.png", (255, 0, 0))
        write_image(tmp_path / "in" / split / "blue" / "b.JPG", (0, 0, 255))
    images = prepare_images("images", tmp_path / "out", [tmp_path / "in"], 4)
    assert images.class_names == ("blue", "red") and list(images.splits) == ["train", "valid"]
    train = images.split("train")
    assert train.labels.tolist() == [0, 1]
    assert train.images.shape == (2, 4, 4, 3)
    assert np.abs(train.images[1].astype(int) - [255, 0, 0]).max() == 0
    assert np.abs(train.images[0].astype(int) - [0, 0, 255]).max() < 4  # JPEG


def test_the_square_in_the_middle_is_kept(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :, 0] = np.arange(8) * 10
    for split in ("train", "test"):
        for name in ("a", "b"):
            path = tmp_path / "in" / split / name / "x.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(pixels).save(path)
    images = prepare_images("images", tmp_path / "out", [tmp_path / "in"], 4)
    assert np.array_equal(images.split("test").images[0], pixels[:, 2:6])


def test_a_folder_without_splits_is_split_by_name(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(40)]
    for kind, colour in (("cat", (9, 9, 9)), ("dog", (7, 7, 7))):
        for name in names:
            write_image(tmp_path / "in" / kind / name, colour, (2, 2))
    images = prepare_images("images", tmp_path / "out", [tmp_path / "in"], 2)
    wanted = [folder_split(f"{kind}/{name}") for kind in ("cat", "dog") for name in names]
    assert {n: s.num_images for n, s in images.splits.items()} == {
        split: wanted.count(split) for split in ("train", "valid", "test") if split in wanted
    }


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path, monkeypatch) -> None:  # noqa: ANN001
    write_image(tmp_path / "in" / "train" / "red" / "a.png", (255, 0, 0))
    with pytest.raises(ValueError, match="holds 1 class sub-folder"):
        prepare_images("images", tmp_path / "out", [tmp_path / "in"], 4)
    write_image(tmp_path / "in" / "train" / "blue" / "a.png", (255, 0, 0))
    with pytest.raises(ValueError, match="has images for train only"):
        prepare_images("images", tmp_path / "out", [tmp_path / "in"], 4)
    write_image(tmp_path / "in" / "test" / "green" / "a.png", (255, 0, 0))
    with pytest.raises(ValueError, match="train has no class green"):
        prepare_images("images", tmp_path / "out", [tmp_path / "in"], 4)
    (tmp_path / "in" / "test" / "green").rename(tmp_path / "in" / "test" / "red")
    (tmp_path / "in" / "test" / "red" / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"red/a\.png cannot be read as an image"):
        prepare_images("images", tmp_path / "out", [tmp_path / "in"], 4)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="images is not possible: PIL is not installed .*pillow"):
        prepare_images("images", tmp_path / "out", [tmp_path / "in"], 4)
    assert not (tmp_path / "out").exists()


def test_pixels_that_would_be_cut_off_and_splits_named_twice_are_refused(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "val"):
        for name in ("red", "blue"):
            write_image(tmp_path / "in" / split / name / "a.png", (9, 9, 9))
    (tmp_path / "in" / "test").write_text("a note, no folder")
    wide = tmp_path / "in" / "train" / "red" / "b.png"
    Image.fromarray(np.full((4, 4), 30_000, np.uint16)).save(wide)
    with pytest.raises(ValueError, match=r"red/b\.png has pixels of more than 8 bits .*I;16"):
        prepare_images("images", tmp_path / "out", [tmp_path / "in"], 4)
    wide.unlink()
    write_image(tmp_path / "in" / "valid" / "red" / "a.png", (9, 9, 9))
    with pytest.raises(ValueError, match="has both valid and val"):
        prepare_images("images", tmp_path / "out", [tmp_path / "in"], 4)
    (tmp_path / "in" / "valid").rename(tmp_path / "in" / "red")
    (tmp_path / "in" / "train").rename(tmp_path / "in" / "training")
    with pytest.raises(ValueError, match="has classes in val and none in train"):
        prepare_images("images", tmp_path / "out", [tmp_path / "in"], 4)
    assert not (tmp_path / "out").exists()
    (tmp_path / "in" / "training").rename(tmp_path / "in" / "train")
    images = prepare_images("images", tmp_path / "out", [tmp_path / "in"], 4)
    assert list(images.splits) == ["train", "valid"]


@pytest.mark.parametrize(
    ("name", "inputs", "size", "says"),
    [
        ("digits", ["x"], None, "digits takes no --input"),
        ("digits", [], 8, "digits has its own size"),
        ("cifar10", [], None, "cifar10 needs one --input"),
        ("images", ["x"], None, "images needs --image-size"),
        ("images", ["x"], 4, "--input x is no folder"),
    ],
)
def test_requests_that_do_not_fit(tmp_path: Path, name, inputs, size, says) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match=says):
        prepare_images(name, tmp_path / "out", inputs, size)
