"""Shapes of single layers for the cost formulas, named by sizes and settings in one list."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.plan.shape import LayerShape

SETTINGS = {field.name for field in fields(VQConfig)}


def shape(**sizes_and_settings: Any) -> LayerShape:
    """A layer that dispatches tokens, unless ``execution`` says otherwise."""
    sizes = {name: v for name, v in sizes_and_settings.items() if name not in SETTINGS}
    settings = {name: v for name, v in sizes_and_settings.items() if name in SETTINGS}
    return LayerShape(vq=_settings({"execution": "tokens", **settings}), **sizes)


def changed(layer: LayerShape, **sizes_and_settings: Any) -> LayerShape:
    """The layer with other sizes or settings."""
    sizes = {name: v for name, v in sizes_and_settings.items() if name not in SETTINGS}
    settings = {name: v for name, v in sizes_and_settings.items() if name in SETTINGS}
    return replace(layer, vq=_settings(asdict(layer.vq) | settings), **sizes)


def _settings(settings: dict[str, Any]) -> VQConfig:
    """With the quantiser that several slices, or a dimension of their own, ask for, if no other of
    those that have them is named."""
    if settings.get("quantizer") in ("residual", "fsq", "lfq"):
        return VQConfig(**settings)
    quantizer = "product" if settings.get("num_code_slices", 1) > 1 else "euclidean"
    quantizer = "low_dim" if settings.get("code_dim") is not None else quantizer
    return VQConfig(**settings | {"quantizer": quantizer})
