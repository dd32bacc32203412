"""The discrete path of a trained layer as a table, for inference: nearest code, then a gather.

T tokens, H hidden size, C code slices, K codes per slice, D = H / C (for low_dim the space's own).
Row ids are ``slice * K + code`` in ``[0, C * K)``.

``vqmoe export`` writes one safetensors file per layer; ``load_table_layer`` reads it. Needs torch
and safetensors, neither Megatron nor ranks. File contents:

    codes               [C, K, D]  in the space of the search (of length sqrt(H) for cosine)
    projection          [D, H]     into that space, for low_dim, fsq and lfq
    table               [C * K, H] the experts' outputs; with C = 1 through the output norm
    output_norm.weight  [H]        of the norm on a sum of C > 1 rows, where there is one
    output_norm.bias    [H]        for LayerNorm
    gate.weight         [G, H]     of the combine gate, for path=dual; G = 2 for softmax, else 1
    gate.bias           [G]

1. Tokens are brought into the codebook's space.
2. The nearest codes [T, C] are the rows to read.
3. A token's rows are summed and scaled by 1 / sqrt(C), then normed.
4. For path=dual the gate weighs the result against the continuous path's output.
5. Where the layer has a code memory, what that adds (``memory_tables``) is added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vqmoe_megatron import registry
from vqmoe_megatron.vq.combine import gather_scale_add

TABLE_FORMAT_VERSION = 2
WITHOUT_MEMORY = "1"  # the format before, whose files know no code memory
LEGAL_SETTINGS = {
    "path": ("discrete", "dual"),
    "combine": ("none", "softmax", "sigmoid"),
    "normalization": ("none", "LayerNorm", "RMSNorm"),
    "output_norm": ("none", "in_table", "after_sum"),
    "code_memory": ("none", "added"),
}
OPTIONAL_TENSORS = (
    "output_norm.weight",
    "output_norm.bias",
    "gate.weight",
    "gate.bias",
)


@dataclass(frozen=True)
class TableSettings:
    """What the tensors of one file mean; its metadata, as text."""

    quantizer: str
    path: str  # discrete: the table is the layer; dual: its output meets the continuous path's
    combine: str  # of path=dual
    num_code_slices: int  # C
    normalization: str  # of the output norm
    normalization_eps: float
    output_norm: str  # where it acts: on the rows of the table, or after their sum
    layer_number: int  # from 1, over the whole model
    iteration: int  # of the checkpoint
    computed_in: str  # dtype of the experts that filled the table
    code_memory: str = "none"  # added: the layer adds rows of a code memory (vq/memory_tables.py)
    format_version: int = TABLE_FORMAT_VERSION

    def __post_init__(self) -> None:
        registry.check_name("quantizer", self.quantizer)
        for name, legal in LEGAL_SETTINGS.items():
            if getattr(self, name) not in legal:
                raise ValueError(
                    f"table setting {name}={getattr(self, name)!r}: choose one of "
                    f"{', '.join(legal)}"
                )

    def as_metadata(self) -> dict[str, str]:
        """Return all settings as text, for the file."""
        return {name: str(value) for name, value in asdict(self).items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> TableSettings:
        """Read them back.

        Raises:
            ValueError: for another format version, or a setting that is missing or illegal.
        """
        version = metadata.get("format_version")
        if version == WITHOUT_MEMORY:
            metadata = {"code_memory": "none", **metadata}
            version = metadata["format_version"] = str(TABLE_FORMAT_VERSION)
        if version != str(TABLE_FORMAT_VERSION):
            raise ValueError(
                f"table format {version}, this release reads {TABLE_FORMAT_VERSION}; export the "
                "checkpoint again with vqmoe export"
            )
        missing = [spec.name for spec in fields(cls) if spec.name not in metadata]
        if missing:
            raise ValueError(f"the table's metadata lack {', '.join(missing)}")
        kinds = {"int": int, "float": float, "str": str}
        return cls(**{spec.name: kinds[spec.type](metadata[spec.name]) for spec in fields(cls)})


class TableLayer(torch.nn.Module):
    """Stands in for a trained layer (path=discrete) or its discrete half (path=dual).

    Codes and table stay as exported (fp32) when the model around them is cast: the search needs the
    digits. Results have the dtype of the tokens and no gradient; on CUDA the kernels of this folder
    run.

    Args:
        tensors: of one file, see above.
        metadata: of the same file.

    Raises:
        ValueError: when they do not fit each other.
    """

    codes: torch.Tensor  # fp32 [C, K, D]
    rows: torch.Tensor  # fp32 [C * K, H], scaled by 1 / sqrt(C)

    def __init__(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        super().__init__()
        self.settings = TableSettings.from_metadata(metadata)
        _check_shapes(tensors, self.settings)
        self.num_slices, self.num_codes, _ = tensors["codes"].shape
        self.hidden_size = tensors["table"].shape[1]
        self.register_buffer("codes", tensors["codes"])
        self.register_buffer("rows", tensors["table"] * self.num_slices**-0.5)
        for name in OPTIONAL_TENSORS:
            self.register_buffer(name.replace(".", "_"), tensors.get(name))
        self.quantizer = registry.load("quantizer", self.settings.quantizer)
        self.constants = tuple(self.quantizer.constant_shapes(0, 0))
        for name in self.constants:
            self.register_buffer(name, tensors[name])

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):  # noqa: ANN202
        """Follow device moves and nothing else."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Evaluate the layer on ``[..., H]``: the same shape and dtype. No communication.

        ``memory`` is what the layer's code memory adds, of that shape.

        Raises:
            ValueError: for path=dual, of which the table is one half; without the memory of a layer
                that has one, or with one of a layer that has none; else as :meth:`discrete`.
        """
        if self.settings.path == "dual":
            raise ValueError(
                "this table is the discrete half of a layer with path=dual: call "
                "combine(x, y_continuous), or discrete(x) for the half alone"
            )
        return self._with_memory(self.discrete(x), memory)

    def discrete(self, x: torch.Tensor) -> torch.Tensor:
        """Return the discrete path's output for ``[..., H]``: the same shape and dtype.

        Raises:
            ValueError: for another width than H, or where a gradient is wanted.
        """
        tokens = self._tokens(x)
        y = gather_scale_add(self.rows, self._row_ids(tokens), dtype=x.dtype)
        return self._output_norm(y).view(x.shape)

    def combine(
        self, x: torch.Tensor, y_continuous: torch.Tensor, memory: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Weigh the continuous path's output against the discrete one's by the gate.

        Args:
            x: ``[..., H]``, what both paths were given.
            y_continuous: of the same shape.
            memory: what the layer's code memory adds, of the same shape.

        Returns:
            ``[..., H]`` in the dtype of ``x``: softmax p_c y_c + p_d y_d, or sigmoid y_c + s y_d,
            and the memory.

        Raises:
            ValueError: for path=discrete, which has no gate; for shapes that do not fit; where a
                gradient is wanted; for the memory as :meth:`forward`.
        """
        if self.settings.path != "dual":
            raise ValueError("a layer with path=discrete has no combine gate: call it with x alone")
        if y_continuous.shape != x.shape:
            raise ValueError(
                f"x {list(x.shape)} and y_continuous {list(y_continuous.shape)} differ in shape"
            )
        tokens, y_continuous = self._tokens(x), self._tokens(y_continuous)
        p_continuous, p_discrete = self._gate(tokens)
        if self.settings.output_norm != "after_sum":  # no need to store the discrete output
            ids = self._row_ids(tokens)
            y = gather_scale_add(
                self.rows, ids, 1.0, y_continuous, p_continuous, p_discrete, x.dtype
            )
            return self._with_memory(y.view(x.shape), memory)
        first = y_continuous
        if p_continuous is not None:
            first = p_continuous.unsqueeze(1) * y_continuous
        y = first + p_discrete.unsqueeze(1) * self.discrete(tokens)
        return self._with_memory(y.to(x.dtype).view(x.shape), memory)

    def _with_memory(self, y: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
        has_memory = self.settings.code_memory == "added"
        if has_memory != (memory is not None):
            raise ValueError(
                "this layer adds rows of a code memory: pass memory=, which load_code_memory of "
                "vqmoe_megatron.vq.memory_tables gives"
                if has_memory
                else "this layer has no code memory: leave memory= out"
            )
        if memory is None:
            return y
        if memory.shape != y.shape:
            raise ValueError(f"output {list(y.shape)} and memory {list(memory.shape)} differ")
        return y + memory

    def _tokens(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` -> ``[T, H]`` without gradient."""
        if x.shape[-1] != self.hidden_size:
            raise ValueError(f"input {list(x.shape)} does not end in H = {self.hidden_size}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "a table gives no gradient to its input: call it under torch.no_grad(), and train "
                "the layer it was exported from"
            )
        return x.detach().reshape(-1, self.hidden_size)

    def _row_ids(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` -> int64 ``[T, C]``; as ``Codebook.prepare`` and ``CodeMap.row_ids``."""
        space = {name: getattr(self, name) for name in self.constants}
        codes = self.quantizer.nearest(self.quantizer.into_space(tokens, space), self.codes)
        return codes + torch.arange(self.num_slices, device=codes.device) * self.num_codes

    def _gate(self, tokens: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Weights ``[T]`` of the continuous (None: one) and the discrete path, fp32 or fp64."""
        weight, bias = self.gate_weight.to(tokens.dtype), self.gate_bias.to(tokens.dtype)
        logits = torch.nn.functional.linear(tokens, weight, bias)
        if logits.dtype not in (torch.float32, torch.float64):
            logits = logits.float()
        if self.settings.combine == "sigmoid":
            return None, logits.sigmoid().squeeze(1)
        p = logits.softmax(dim=-1)
        return p[:, 0], p[:, 1]

    def _output_norm(self, y: torch.Tensor) -> torch.Tensor:
        if self.settings.output_norm != "after_sum":
            return y
        shape, eps = (self.hidden_size,), self.settings.normalization_eps
        weight = self.output_norm_weight.to(y.dtype)
        if self.settings.normalization == "RMSNorm":
            return torch.nn.functional.rms_norm(y, shape, weight, eps)
        bias = self.output_norm_bias.to(y.dtype)
        return torch.nn.functional.layer_norm(y, shape, weight, bias, eps)


def load_table_layer(path: str | Path) -> TableLayer:
    """Read one file of ``vqmoe export --tables`` into CPU memory.

    Raises:
        ValueError: when it cannot be read or is no table of this release.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error
    try:
        return TableLayer(tensors, metadata)
    except ValueError as error:
        raise ValueError(f"{path} is no table of vqmoe export: {error}") from error


def _check_shapes(tensors: Mapping[str, torch.Tensor], settings: TableSettings) -> None:
    """Refuse tensors that are missing, left over, or of a shape that the others exclude."""
    codes, table = tensors.get("codes"), tensors.get("table")
    quantizer = registry.load("quantizer", settings.quantizer)
    is_projected, is_sliced = quantizer.is_projected, quantizer.is_sliced
    if (
        codes is None
        or table is None
        or (codes.dim(), table.dim()) != (3, 2)
        or codes.shape[0] != settings.num_code_slices
        or table.shape[0] != codes.shape[0] * codes.shape[1]
        or not (
            is_projected or table.shape[1] == (codes.shape[0] if is_sliced else 1) * codes.shape[2]
        )
    ):
        of_width = "" if is_projected else f" with H = {'C * D' if is_sliced else 'D'}"
        codes, table = ("none" if part is None else list(part.shape) for part in (codes, table))
        raise ValueError(
            f"codes {codes} and table {table} do not fit: need codes [C, K, D] with C = "
            f"{settings.num_code_slices}, table [C * K, H]{of_width}"
        )
    hidden = table.shape[1]
    wanted = {"codes": list(codes.shape), "table": list(table.shape)}
    wanted |= quantizer.constant_shapes(codes.shape[2], hidden)
    if settings.output_norm == "after_sum":
        wanted["output_norm.weight"] = [hidden]
        if settings.normalization == "LayerNorm":
            wanted["output_norm.bias"] = [hidden]
    if settings.path == "dual":
        num_logits = 2 if settings.combine == "softmax" else 1
        wanted |= {"gate.weight": [num_logits, hidden], "gate.bias": [num_logits]}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if found != wanted:
        raise ValueError(f"the tensors are {found}, the settings need {wanted}")
