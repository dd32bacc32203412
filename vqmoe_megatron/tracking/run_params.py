"""A run's configuration as MLflow parameters: flat Megatron-named keys, values within limits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass

MAX_PARAM_CHARACTERS = 6000  # MLflow 3 limits, mlflow/utils/validation.py
MAX_TAG_CHARACTERS = 8000


def flatten_config(config: object) -> dict[str, object]:
    """Return ``{"parallel.tensor_model_parallel_size": 1, ...}`` of a dataclass or mapping.

    Lists stay whole, as JSON text. ``ValueError`` when ``config`` is neither.
    """
    tree = asdict(config) if is_dataclass(config) and not isinstance(config, type) else config
    if not isinstance(tree, Mapping):
        raise ValueError(
            f"a configuration is a dataclass or mapping, not a {type(config).__name__}"
        )
    flat: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) or is_dataclass(value):
            flat |= {f"{name}.{inner}": leaf for inner, leaf in flatten_config(value).items()}
        else:
            flat[str(name)] = json.dumps(value) if isinstance(value, list | tuple) else value
    return flat


def shortened(
    values: Mapping[str, object], max_characters: int, report: Callable[[str], None]
) -> dict[str, str]:
    """Return the values as text, cut to ``max_characters`` each; every cut is reported."""
    texts = {name: str(value) for name, value in values.items()}
    for name, text in texts.items():
        if len(text) > max_characters:
            report(f"{name} cut from {len(text)} to MLflow's limit of {max_characters} characters")
    return {name: text[:max_characters] for name, text in texts.items()}
