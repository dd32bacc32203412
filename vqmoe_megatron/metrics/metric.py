"""One row of the metric table: a number of a run, or a scalar of each of its layers.

"DP" in a reduction means the ranks that saw different tokens (data and context parallel).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

# MLflow 3 accepts letters, digits, "_ - . space : /", no empty path part, at most 250 characters.
MLFLOW_NAME = re.compile(r"^[\w\-. :]+(/[\w\-. :]+)*$", re.ASCII)
MLFLOW_MAX_NAME_LENGTH = 250
OF_LAYERS = re.compile(r"^([a-z0-9_]+)/([a-z0-9_]+)$")
LAYER_NAME = re.compile(r"^([a-z0-9_]+)/layer_(\d{2,})/([a-z0-9_]+)$")


@dataclass(frozen=True)
class Metric:
    """A number of the whole run, logged under ``name`` by whoever computes it.

    Raises:
        ValueError: for a name that MLflow would refuse.
    """

    name: str
    description: str
    unit: str
    reduction: str  # over what the number is reduced, and who has it
    console_format: str | None = None  # a format spec; None: not on the console
    console_note: str = ""  # stands behind the number there, where the name alone would be misread

    def __post_init__(self) -> None:
        if not is_mlflow_name(self.name):
            raise ValueError(
                f"MLflow refuses the metric name {self.name!r}: use letters, digits, _ - . space : "
                f"/, no empty part, at most {MLFLOW_MAX_NAME_LENGTH} characters"
            )


@dataclass(frozen=True)
class LayerMetric(Metric):
    """A scalar of a VQMoE layer, logged per layer and once over all layers.

    A layer gives it among its scalars under what stands behind the ``/`` of ``name``, taken over
    all tokens of the step (microbatches, DP). It exists twice: over layers (``vq/dead_codes``) and
    per layer (``vq/layer_03/dead_codes``, Megatron's 1-based layer number).

    Raises:
        ValueError: for a name that is not ``group/scalar``, and an unknown reduction.
    """

    reduction: Literal["mean", "sum"] = "mean"  # over layers
    over_steps: Literal["last", "sum"] = "last"  # since the last log
    # Known once the codebook has moved. Megatron's MoE log is written before, and lacks it.
    needs_update: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not OF_LAYERS.match(self.name):
            raise ValueError(
                f"the metric name {self.name!r} has no per-layer spelling: write group/scalar in "
                "lower case, digits and _"
            )
        if self.reduction not in ("mean", "sum") or self.over_steps not in ("last", "sum"):
            raise ValueError(
                f"metric {self.name}: reduction={self.reduction!r} must be mean or sum, "
                f"over_steps={self.over_steps!r} last or sum"
            )

    @property
    def scalar(self) -> str:
        """What a layer calls it."""
        return self.name.partition("/")[2]

    def name_of_layer(self, layer_number: int) -> str:
        """The per-layer spelling: of ``vq/dead_codes`` and 3, ``vq/layer_03/dead_codes``."""
        group, _, scalar = self.name.partition("/")
        return f"{group}/layer_{layer_number:02d}/{scalar}"


def is_mlflow_name(name: str) -> bool:
    """Tell whether MLflow accepts ``name`` as a metric or parameter key."""
    return (
        bool(MLFLOW_NAME.match(name))
        and len(name) <= MLFLOW_MAX_NAME_LENGTH
        and not {".", ".."} & set(name.split("/"))
    )
