"""The code memory of a trained model as tables, for inference: token ids to rows, rows to sums.

b sequences of S tokens, H hidden size, V vocabulary entries (padded), A addresses per token, M rows
per address, R = A M, Kc codes of contexts of width d, K codes of hidden states.

``vqmoe export`` writes them beside the layers' tables; ``load_code_memory`` reads the folder. Needs
torch and safetensors, neither Megatron nor ranks.

    code_memory.safetensors    how a token finds its rows, once for the model
        code_of_token   [V]        int64
        context_table   [V, d]     fp32, with contexts: embeddings as they are compared
        context_codes   [Kc, d]    fp32, with contexts
      with code_memory.codes=hidden none of them: rows follow the layer's own input
    memory_0001.safetensors    of each layer that carries memory
        rows            [R, H]     fp32; for values=experts what their owners made of them
        gate.weight     [1, H]     fp32, with code_memory.gate=token
        gate.bias       [1]
        codes           [1, K, H]  fp32, with code_memory.codes=hidden

A layer's output is what its table says (for path=dual what the gate makes of both paths) plus what
its memory adds; ``TableLayer`` takes that as ``memory``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vqmoe_megatron.vq.context_means import context_means
from vqmoe_megatron.vq.row_addresses import row_ids, tokens_before
from vqmoe_megatron.vq.search import nearest_code
from vqmoe_megatron.vq.segment_sum import sum_looked_up_rows

MEMORY_FORMAT_VERSION = 1
CODES_FILE = "code_memory.safetensors"
LAYER_FILES = "memory_*.safetensors"


@dataclass(frozen=True)
class MemorySettings:
    """What the tensors of a file mean; its metadata, as text."""

    codes: str  # as code_memory.codes
    num_rows: int  # M
    max_order: int
    num_context_codes: int  # Kc; 0: no contexts
    context_decay: float
    gate: str  # none | token
    layer_number: int  # from 1, over the whole model; 0: the file of the codes
    iteration: int  # of the checkpoint
    format_version: int = MEMORY_FORMAT_VERSION

    @property
    def num_addresses(self) -> int:
        """A."""
        return self.max_order + (2 if self.num_context_codes else 0)

    def as_metadata(self) -> dict[str, str]:
        """Return all settings as text, for the file."""
        return {name: str(value) for name, value in asdict(self).items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> MemorySettings:
        """Read them back.

        Raises:
            ValueError: for another format version, or a setting that is missing.
        """
        version = metadata.get("format_version")
        if version != str(MEMORY_FORMAT_VERSION):
            raise ValueError(
                f"code memory format {version}, this release reads {MEMORY_FORMAT_VERSION}; export "
                "the checkpoint again with vqmoe export"
            )
        missing = [spec.name for spec in fields(cls) if spec.name not in metadata]
        if missing:
            raise ValueError(f"the code memory's metadata lack {', '.join(missing)}")
        kinds = {"int": int, "float": float, "str": str}
        return cls(**{spec.name: kinds[spec.type](metadata[spec.name]) for spec in fields(cls)})


class _Tables(torch.nn.Module):
    """Buffers that follow device moves and nothing else: the search needs the digits."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str],
        wanted: Callable[[MemorySettings], dict[str, int]],
    ) -> None:
        """``wanted``: names and numbers of axes that settings ask for."""
        super().__init__()
        self.settings = MemorySettings.from_metadata(metadata)
        found = {name: tensor.dim() for name, tensor in tensors.items()}
        if found != (needed := wanted(self.settings)):
            raise ValueError(f"the tensors and their axes are {found}, the settings need {needed}")
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "_"), tensor)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):  # noqa: ANN202
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class MemoryCodes(_Tables):
    """Rows of token ids; the same for all layers, unless codes are of hidden states."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        super().__init__(tensors, metadata, _tensors_of_codes)

    def row_ids(self, token_ids: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Token ids int64 ``[b, S]`` -> row ids int64 ``[b, S, A]``.

        Args:
            token_ids: whole sequences; a token's rows follow from those before it in its document.
            starts: bool ``[b, S]``, first tokens of documents; a sequence starts one anyway.

        Raises:
            ValueError: where rows follow hidden states; for shapes that differ.
        """
        settings = self.settings
        if settings.codes == "hidden":
            raise ValueError(
                "code_memory.codes=hidden: rows follow the layer's input, not token ids; ask "
                "MemoryLayer.row_ids"
            )
        _check_starts(token_ids, starts)
        codes = self.code_of_token[token_ids]
        context_codes = None
        if settings.num_context_codes:
            vectors = self.context_table[token_ids]
            means = context_means(vectors, tokens_before(starts), settings.context_decay)
            context_codes = nearest_code(means.flatten(0, 1), self.context_codes).view_as(codes)
        return row_ids(codes, starts, settings.num_rows, settings.max_order, context_codes)


class MemoryLayer(_Tables):
    """What one layer's memory adds, without gradient."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        super().__init__(tensors, metadata, _tensors_of_layer)
        num_rows = self.settings.num_addresses * self.settings.num_rows
        if self.rows.shape[0] != num_rows:
            raise ValueError(f"rows {list(self.rows.shape)}: the settings need {num_rows} rows")

    def row_ids(self, x: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """The layer's input ``[b, S, H]`` -> row ids int64 ``[b, S, A]``.

        Raises:
            ValueError: where rows follow token ids; for shapes that differ.
        """
        settings = self.settings
        if settings.codes != "hidden":
            raise ValueError(
                f"code_memory.codes={settings.codes}: rows follow token ids; ask "
                "MemoryCodes.row_ids"
            )
        _check_starts(x[..., 0], starts)
        codes = nearest_code(x.detach().flatten(0, 1), self.codes)[:, 0].view_as(starts)
        return row_ids(codes.long(), starts, settings.num_rows, settings.max_order)

    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """What the memory adds to the layer's output.

        Args:
            x: ``[b, S, H]``, the layer's input: for the gate, and for the dtype of the result.
            rows: int64 ``[b, S, A]``.

        Returns:
            ``[b, S, H]`` in the dtype of ``x``.

        Raises:
            ValueError: for shapes that do not fit.
        """
        width, num_addresses = self.rows.shape[1], self.settings.num_addresses
        if x.shape != (*rows.shape[:-1], width) or rows.shape[-1] != num_addresses:
            raise ValueError(
                f"x {list(x.shape)} and rows {list(rows.shape)} do not fit: need [b, S, {width}] "
                f"and [b, S, {num_addresses}]"
            )
        x = x.detach()
        y = sum_looked_up_rows(self.rows, rows.flatten(0, -2), 1.0, x.dtype).view(x.shape)
        if self.settings.gate == "none":
            return y
        weight, bias = self.gate_weight.to(x.dtype), self.gate_bias.to(x.dtype)
        return (y * torch.nn.functional.linear(x, weight, bias).sigmoid()).to(x.dtype)


@dataclass(frozen=True)
class CodeMemoryTables:
    """The memory of a model."""

    codes: MemoryCodes
    layers: dict[int, MemoryLayer]  # by number from 1; those that carry memory

    def adds(
        self, number: int, x: torch.Tensor, token_ids: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor | None:
        """What layer ``number`` adds for its input ``[b, S, H]``; None where it has no memory.

        ``token_ids`` int64 and ``starts`` bool are ``[b, S]``. Whoever evaluates many layers takes
        ``codes.row_ids`` once, and calls the layers with it.

        Raises:
            ValueError: for shapes that do not fit.
        """
        if number not in self.layers:
            return None
        layer = self.layers[number]
        if self.codes.settings.codes == "hidden":
            return layer(x, layer.row_ids(x, starts))
        return layer(x, self.codes.row_ids(token_ids, starts))


def load_code_memory(folder: str | Path) -> CodeMemoryTables:
    """Read the code memory of a folder of ``vqmoe export --tables`` into CPU memory.

    Raises:
        ValueError: when a file cannot be read, or is none of this release.
    """
    folder = Path(folder)
    codes = _load(MemoryCodes, folder / CODES_FILE)
    layers = [_load(MemoryLayer, path) for path in sorted(folder.glob(LAYER_FILES))]
    return CodeMemoryTables(codes, {layer.settings.layer_number: layer for layer in layers})


def _load(kind: type, path: Path):  # noqa: ANN202
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error
    try:
        return kind(tensors, metadata)
    except ValueError as error:
        raise ValueError(f"{path} is no code memory of vqmoe export: {error}") from error


def _tensors_of_codes(settings: MemorySettings) -> dict[str, int]:
    if settings.codes == "hidden":
        return {}
    of_contexts = {"context_table": 2, "context_codes": 2} if settings.num_context_codes else {}
    return {"code_of_token": 1} | of_contexts


def _tensors_of_layer(settings: MemorySettings) -> dict[str, int]:
    wanted = {"rows": 2}
    if settings.gate == "token":
        wanted |= {"gate.weight": 2, "gate.bias": 1}
    return wanted | ({"codes": 3} if settings.codes == "hidden" else {})


def _check_starts(tokens: torch.Tensor, starts: torch.Tensor) -> None:
    if tokens.dim() != 2 or tokens.shape != starts.shape:
        raise ValueError(
            f"tokens {list(tokens.shape)} and starts {list(starts.shape)} must both be [b, S]"
        )
