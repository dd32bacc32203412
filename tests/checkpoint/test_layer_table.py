"""A layer's table gives the layer's own output, for every kind of codes, norms and gates.

With path=discrete bitwise: the rows pass through the same operations. In a dual layer the code rows
share a grouped GEMM with the tokens', whose rounding may follow the number of rows; the continuous
path's output comes from the layer itself, with its discrete path taken out.
"""

from __future__ import annotations

import dataclasses

import pytest

pytestmark = pytest.mark.distributed

BASE = {"num_codes": 10, "init": "uniform", "path": "discrete"}
PRODUCT = {"quantizer": "product", "num_code_slices": 2}
RESIDUAL = {"quantizer": "residual", "num_code_slices": 3}
FIXED = {"freeze_codebook": True, "codebook_update": "gradient"}
CASES = {
    "plain": {"norm": "none"},
    "separate": {"norm": "separate"},
    "shared": {"norm": "shared"},
    "rms-separate": {"norm": "separate", "normalization": "RMSNorm"},
    "cosine": {"quantizer": "cosine"},
    "low-dim": {"quantizer": "low_dim", "code_dim": 4},
    "low-dim-learned": {"quantizer": "low_dim", "code_dim": 4, "code_input": "learned"},
    "low-dim-trained": {"quantizer": "low_dim", "code_dim": 4, "train_projection": True},
    "cosine-scale": {"quantizer": "cosine", "learn_code_scale": True},
    "residual": RESIDUAL,
    "residual-learned-shared": {**RESIDUAL, "code_input": "learned", "norm": "shared"},
    "dual-residual": {**RESIDUAL, "path": "dual", "norm": "none"},
    "fsq": {**FIXED, "quantizer": "fsq", "code_dim": 2, "fsq_levels": [5, 2]},
    "lfq": {**FIXED, "quantizer": "lfq", "code_dim": 3, "num_codes": 8},
    "learned": {"code_input": "learned"},
    "product-plain": {**PRODUCT, "norm": "none"},
    "product-separate": {**PRODUCT, "norm": "separate"},
    "product-shared": {**PRODUCT, "norm": "shared"},
    "product-rms": {**PRODUCT, "norm": "separate", "normalization": "RMSNorm"},
    "product-learned": {**PRODUCT, "code_input": "learned"},
    "kept-table": {"table_per_step": True},
    "gated": {"gated": True},
    "dual": {"path": "dual"},
    "dual-sigmoid": {"path": "dual", "combine": "sigmoid", "quantizer": "cosine"},
    "dual-product": {"path": "dual", **PRODUCT, "norm": "shared", "code_input": "learned"},
    "dual-in-tokens": {"path": "dual", "execution": "tokens"},
}


def compare(settings: dict, dtype_name: str) -> dict:
    """Largest difference over the largest output, of the layer and of its table. In a rank."""
    import torch
    from tiny_layer import ACTIVATIONS, HIDDEN, build_layer, draw_parameters

    from vqmoe_megatron.checkpoint.layer_table import layer_table
    from vqmoe_megatron.config import VQConfig
    from vqmoe_megatron.moe.combine_gate import OnePath
    from vqmoe_megatron.vq.table_layer import TableLayer

    settings, dtype = dict(settings), getattr(torch, dtype_name)
    normalization = settings.pop("normalization", "LayerNorm")
    gated = settings.pop("gated", False)
    vq = VQConfig(**BASE | settings)
    drawn = draw_parameters(vq, gated=gated, normalization=normalization)
    drawn = {name: tensor.to(dtype) for name, tensor in drawn.items()}
    changes = {"normalization": normalization, "gated_linear_unit": gated}
    changes["activation_func"] = ACTIVATIONS["silu" if gated else "gelu"]
    layer = build_layer(vq, drawn, **changes).eval()
    x = torch.randn(11, 3, HIDDEN, generator=torch.Generator().manual_seed(3)).to(dtype)
    in_code_space = layer
    if vq.execution == "tokens":
        other = dataclasses.replace(vq, execution="code_space")
        in_code_space = build_layer(other, drawn, **changes).eval()
    with torch.no_grad():
        expected = layer(x)[0]
        tensors, written = layer_table(in_code_space, iteration=5)
        table = TableLayer(tensors, written.as_metadata())
        if vq.path == "discrete":
            found, distinct = table(x), expected.reshape(-1, HIDDEN).unique(dim=0)
        else:
            layer.paths, layer.gate = layer.paths[:1], OnePath()
            found, distinct = table.combine(x, layer(x)[0]), table.discrete(x)
    return {
        "error": float((found - expected).abs().max() / expected.abs().max()),
        "equal": torch.equal(found, expected),
        "num_distinct": distinct.reshape(-1, HIDDEN).unique(dim=0).shape[0],
        "dtype": str(found.dtype),
    }


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_the_table_gives_the_layers_output(name, dtype, ranks):
    (found,) = ranks(1).run(compare, CASES[name], dtype)
    tolerance = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 1e-2}[dtype]
    assert found["error"] <= tolerance
    assert found["dtype"] == f"torch.{dtype}"
    assert found["num_distinct"] >= 5  # the tokens really read different rows
    if CASES[name].get("path") != "dual":
        assert found["equal"]


def tables() -> dict:
    """This rank's view of the table at the current layout."""
    from tiny_layer import build_layer, draw_parameters

    from vqmoe_megatron.checkpoint.layer_table import layer_table
    from vqmoe_megatron.config import VQConfig

    vq = VQConfig(**BASE | PRODUCT)
    drawn = {name: tensor.float() for name, tensor in draw_parameters(vq).items()}
    return layer_table(build_layer(vq, drawn).eval(), iteration=5)[0]


def test_rows_lie_in_natural_order_wherever_they_were_evaluated(ranks):
    import torch

    (alone,) = ranks(1).run(tables)
    for found in ranks(2).run(tables, layout={"expert_model_parallel_size": 2}):
        assert found.keys() == alone.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-6, atol=1e-6)


def uninitialised() -> str:
    from tiny_layer import build_layer

    from vqmoe_megatron.checkpoint.layer_table import layer_table
    from vqmoe_megatron.config import VQConfig

    try:
        layer_table(build_layer(VQConfig(**BASE | {"init": "data"})).eval(), iteration=0)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_codes_that_saw_no_data_are_refused(ranks):
    assert "layer 1: its codes are not initialised" in ranks(1).run(uninitialised)[0]
