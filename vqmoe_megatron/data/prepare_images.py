"""``vqmoe prepare`` of images: a source in, a folder of mapped arrays out.

1. Check the request and ``--out``; nothing is written where it is refused.
2. Find and split the images (image_sources.py).
3. Per split: write pixels and labels image by image, and take the train split's mean and spread.
4. Write ``images.json`` with the checksums. All of it happens aside; the whole folder then takes
   its name in one step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vqmoe_megatron.data.image_set import (
    FORMAT_VERSION,
    IMAGES_FILE,
    SPLITS,
    ImageSet,
    check_files,
    file_sha256,
    images_name,
    labels_name,
    load_image_set,
)
from vqmoe_megatron.data.image_sources import ImageSource, check_image_request, open_images
from vqmoe_megatron.rundir.own_outputs import check_new_folder, new_folder, said_as_refusal


def prepare_images(
    name: str, out_dir: Path, inputs: list[Path], image_size: int | None = None
) -> ImageSet:
    """Prepare ``name``, one of image_sources.IMAGE_SETS, in ``out_dir`` and return it.

    A whole set from the same request and the same images is checked and returned as it is. Raises
    ``ValueError`` for whatever a user can cause, and then leaves ``out_dir`` as it was; for another
    set in it, too, which is never replaced. Needs no network. Does not communicate.
    """
    out_dir, inputs = Path(out_dir), [Path(path) for path in inputs]
    check_image_request(name, inputs, image_size)
    if (out_dir / IMAGES_FILE).exists():
        return _existing(out_dir, name, inputs, image_size)
    check_new_folder(out_dir)
    source = open_images(name, inputs, image_size)
    with said_as_refusal(out_dir), new_folder(out_dir) as partial:
        text = json.dumps(_written(partial, name, source), indent=2) + "\n"
        (partial / IMAGES_FILE).write_text(text, encoding="utf-8")
    return load_image_set(out_dir)


def _existing(out_dir: Path, name: str, inputs: list[Path], image_size: int | None) -> ImageSet:
    existing = load_image_set(out_dir)
    check_files(existing)
    recorded = json.loads(existing.content)
    source = open_images(name, inputs, image_size)
    asked = _described(name, source)
    differences = [key for key, value in asked.items() if recorded.get(key) != value]
    differences += [
        f"splits.{split}"
        for split, number in source.num_images.items()
        if split not in existing.splits or existing.splits[split].num_images != number
    ]
    if differences:
        raise ValueError(
            f"{out_dir} holds another set of images ({', '.join(differences)} differ); choose "
            "another --out, or move it away: prepare replaces no images"
        )
    return existing


def _described(name: str, source: ImageSource) -> dict[str, Any]:
    return {
        "corpus": name,
        "source": source.description,
        "image_size": source.image_size,
        "num_channels": source.num_channels,
        "class_names": list(source.class_names),
    }


def _written(folder: Path, name: str, source: ImageSource) -> dict[str, Any]:
    """Write all arrays; return the content of ``images.json``."""
    sums = {split: _write_split(folder, split, source) for split in SPLITS if split in source.read}
    total, squares = sums["train"]
    num_pixels = source.num_images["train"] * source.image_size**2
    mean = total / num_pixels
    std = np.sqrt(np.maximum(squares / num_pixels - mean**2, 0.0))
    return {
        "format_version": FORMAT_VERSION,
        **_described(name, source),
        "channel_mean": mean.tolist(),
        "channel_std": np.where(std > 0, std, 1.0).tolist(),
        "splits": {
            split: {
                "num_images": source.num_images[split],
                "files": {
                    file: {
                        "num_bytes": (folder / file).stat().st_size,
                        "sha256": file_sha256(folder / file),
                    }
                    for file in (images_name(split), labels_name(split))
                },
            }
            for split in sums
        },
    }


def _write_split(folder: Path, split: str, source: ImageSource) -> tuple[np.ndarray, np.ndarray]:
    """Write one split; return sums of pixels, as 0 .. 1, and of their squares, fp64 [channels]."""
    num_images, size = source.num_images[split], source.image_size
    shape = (num_images, size, size, source.num_channels)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    labels = np.empty(num_images, dtype=np.int64)
    total = np.zeros(source.num_channels)
    squares = np.zeros(source.num_channels)
    # Not a mapped array: a disk that gets full would end the process by SIGBUS.
    with (folder / images_name(split)).open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for number, (image, label) in enumerate(source.read[split]()):
            stream.write(image.tobytes())
            labels[number] = label
            shares = image.astype(np.float64) / 255
            total += shares.sum(axis=(0, 1))
            squares += (shares**2).sum(axis=(0, 1))
    np.save(folder / labels_name(split), labels)
    return total, squares
