"""What Megatron-LM's arguments, stored in a checkpoint, say about its model, against a recipe.

Tensors do not tell heads, activation or rotary base: a model of other ones would load, and compute
nonsense. Megatron-LM pickles its ``args`` into ``common.pt``. Whoever unpickles runs what a pickle
names, so here every name but the plain ones stands for an inert object, and nothing is imported.
"""

from __future__ import annotations

import argparse
import builtins
import collections
import pickle
import zipfile
from pathlib import Path
from typing import Any

from vqmoe_megatron.checkpoint.content import COMMON_FILE
from vqmoe_megatron.config import ModelConfig

PLAIN_NAMES: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("collections", "OrderedDict"): collections.OrderedDict,
    **{("builtins", name): getattr(builtins, name) for name in ("set", "dict", "list", "int")},
}
# Megatron-LM's argument -> the recipe's setting of section model, equal in meaning and values.
SAME_SETTINGS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "normalization": "normalization",
    "norm_epsilon": "layernorm_epsilon",
    "swiglu": "gated_linear_unit",
    "add_bias_linear": "add_bias_linear",
    "add_qkv_bias": "add_qkv_bias",
    "position_embedding_type": "position_embedding_type",
    "rotary_base": "rotary_base",
    "untie_embeddings_and_output_weights": "untie_embeddings_and_output_weights",
}
# Of a source with experts.
ROUTER_SETTINGS = {
    "moe_router_topk": "moe_router_topk",
    "moe_router_pre_softmax": "moe_router_pre_softmax",
}
# What a recipe cannot ask for, and the value that it has.
FIXED = {
    "squared_relu": False,
    "qk_layernorm": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "use_rope_scaling": False,
    "multi_latent_attention": False,
    "apply_layernorm_1p": False,
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_enable_expert_bias": False,
    "moe_expert_capacity_factor": None,
}


class _Inert:
    """In the place of whatever a pickle names; it takes any arguments and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return PLAIN_NAMES.get((module, name), _Inert)

    def persistent_load(self, pid: Any) -> Any:
        return None  # a tensor's storage


def stored_arguments(folder: Path) -> dict[str, Any] | None:
    """Return Megatron-LM's arguments by name; None where the folder holds none that can be read."""
    path = folder / COMMON_FILE
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as file:
            (name,) = [name for name in file.namelist() if name.endswith("data.pkl")]
            with file.open(name) as pickled:
                common = _PlainUnpickler(pickled).load()
        arguments = vars(common["args"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pickle.UnpicklingError):
        return None
    except (EOFError, IndexError, zipfile.BadZipFile):
        return None
    return arguments


def argument_problems(
    arguments: dict[str, Any], model: ModelConfig, has_experts: bool
) -> list[str]:
    """Say in what a recipe's model is not the one of ``arguments``; empty where nothing is known
    to differ."""
    settings = SAME_SETTINGS | (ROUTER_SETTINGS if has_experts else {})
    problems = []
    for theirs, ours in settings.items():
        value, wanted = arguments.get(theirs), getattr(model, ours)
        if value is not None and value != wanted:
            problems.append(
                f"model.{ours}: recipe {wanted!r}, the source's args {theirs}={value!r}"
            )
    groups = arguments.get("num_query_groups") if arguments.get("group_query_attention") else None
    if "num_attention_heads" in arguments:
        heads = arguments["num_attention_heads"]
        wanted = model.num_query_groups or model.num_attention_heads
        if (groups or heads) != wanted:
            problems.append(
                f"model.num_query_groups: recipe {model.num_query_groups!r}, the source's args "
                f"num_query_groups={groups or heads!r}"
            )
    for name, value in FIXED.items():
        if name in arguments and arguments[name] != value:
            problems.append(f"the source's args {name}={arguments[name]!r}: a recipe has {value!r}")
    return problems
