"""Which checkpoint an upcycling starts from, and what kind of model lies in it: files only.

Two kinds are told apart by the files of the folder: a checkpoint of ``vqmoe``, which holds its
recipe, or a ``torch_dist`` folder that Megatron-LM or megatron-core wrote of a GPTModel. Nothing is
unpickled but torch's index, by the one reader that knows what it may name.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from vqmoe_megatron.checkpoint.checksums import check_all_files
from vqmoe_megatron.checkpoint.content import check_format_version, read_content
from vqmoe_megatron.checkpoint.folder import (
    CORPUS_COPY,
    FOLDER_PATTERN,
    FORMAT_FILE,
    find_checkpoint,
    read_json_object,
    stored_tokenizer,
)
from vqmoe_megatron.checkpoint.metadata import INDEX_FILE, StoredTensor, read_stored_content
from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.data.corpus import Corpus, check_tokenizer
from vqmoe_megatron.rundir.file_names import CONFIG_FILE

OURS, MEGATRON = "vqmoe", "Megatron-core"
# What a checkpoint holds beside the model, by the beginning of its tensors' names.
NOT_THE_MODEL = re.compile(
    r"(chained_\d+\.)?(optimizer|random_state|rng_state|rerun_state_machine|opt_param_scheduler)"
)
LAYER_NAME = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")
USAGE = "give a run directory of vqmoe, a folder that Megatron saved into, or one iter_ folder"


@dataclass(frozen=True)
class Source:
    """A whole checkpoint on the disk."""

    folder: Path
    kind: str  # OURS | MEGATRON
    config: RunConfig | None  # the recipe in it; Megatron stores none
    tensors: dict[str, StoredTensor]  # of the model, by name

    @property
    def iteration(self) -> int | None:
        """That it was saved at, by the folder's name."""
        found = FOLDER_PATTERN.match(self.folder.name)
        return int(found[1]) if found else None

    @property
    def index_sha256(self) -> str:
        """Digest of its index, which names every tensor and piece: tells two checkpoints apart."""
        return hashlib.sha256((self.folder / INDEX_FILE).read_bytes()).hexdigest()

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        name = "self_attention.linear_proj.weight"
        if (stacked := self.tensors.get(f"decoder.layers.{name}")) is not None:
            return stacked.shape[0]
        return sum(
            LAYER_NAME.fullmatch(key) is not None and key.endswith(name) for key in self.tensors
        )

    def of_layer(self, name: str, layer: int) -> tuple[StoredTensor | None, bool]:
        """Tensor ``name`` of layer ``layer`` (from 0), and whether it holds that of all layers.

        None where the source has none of that name.
        """
        if (own := self.tensors.get(f"decoder.layers.{layer}.{name}")) is not None:
            return own, False
        stacked = self.tensors.get(f"decoder.layers.{name}")
        is_there = stacked is not None and layer < stacked.shape[0]
        return (stacked, True) if is_there else (None, False)

    def num_experts(self, layer: int) -> int | None:
        """Experts of layer ``layer`` (from 0); None for a dense one."""
        stored, is_stacked = self.of_layer("mlp.experts.experts.linear_fc1.weight", layer)
        return None if stored is None else stored.shape[1 if is_stacked else 0]

    def check_vocabulary(self, corpus: Corpus) -> None:
        """Raise ``ValueError`` where the model was trained on other tokens than the corpus has.

        Megatron's checkpoint does not say; there the size of the embedding decides.
        """
        if self.kind == OURS:
            check_tokenizer(corpus, None, stored_tokenizer(self.folder))


def open_source(path: Path) -> Source:
    """Find and check the checkpoint meant by ``path``; see ``USAGE``.

    Every file of a checkpoint of ours is compared with its checksum, which reads all of it.

    Raises:
        ValueError: where there is none, or it is damaged or of another format.
    """
    folder = _folder(path)
    if all((folder / name).is_file() for name in (CONFIG_FILE, CORPUS_COPY)):
        content = read_content(folder)
        check_format_version(folder, content)
        check_all_files(folder)
        return Source(folder, OURS, content.config, _of_model(content.stored.tensors))
    backend = read_json_object(folder / FORMAT_FILE).get("sharded_backend")
    if backend != "torch_dist":
        raise ValueError(
            f"{folder} is stored as {backend!r}; upcycling reads torch_dist, which Megatron-LM "
            "writes with --ckpt-format torch_dist (its --ckpt-convert-format converts)"
        )
    tensors = _of_model(read_stored_content(folder).tensors)
    if not any(name.startswith("decoder.layers.") for name in tensors):
        some = ", ".join(sorted(tensors)[:3]) or "none"
        raise ValueError(
            f"{folder} holds no decoder.layers.*, as megatron-core's GPTModel names them; its "
            f"tensors: {some} ..."
        )
    return Source(folder, MEGATRON, None, tensors)


def _folder(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"{path} does not exist; {USAGE}")
    if (path / FORMAT_FILE).is_file():
        return path
    folder = find_checkpoint(path)
    if folder is None:
        raise ValueError(f"{path} holds no complete checkpoint; {USAGE}")
    return folder


def _of_model(tensors: list[StoredTensor]) -> dict[str, StoredTensor]:
    return {tensor.name: tensor for tensor in tensors if not NOT_THE_MODEL.match(tensor.name)}
