"""A tiny layer trained in a rank as it is, and with a fast form of its discrete path.

Both must give the same outputs, the same gradient of every parameter, and the same codebook. fp64
experts take products of sizes that the host reads, which no graph repeats, so where gradients meet
them (straight_through token, group) layers are fp32.
"""

from __future__ import annotations

import torch
from tiny_layer import HIDDEN, build_layer, draw_parameters

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe import CodebookSync
from vqmoe_megatron.runtime.recorded_graph import RecordedGraph

BASE = {"num_codes": 10, "init": "uniform", "execution": "code_space"}
CASES = {
    "dual": {},
    "discrete": {"path": "discrete"},
    "dual-group": {"straight_through": "group", "norm": "shared"},
    "learned-inputs": {"code_input": "learned", "straight_through": "none"},
    "product": {"quantizer": "product", "num_code_slices": 2, "straight_through": "identity"},
    "low-dim": {"quantizer": "low_dim", "code_dim": 4, "straight_through": "identity"},
    "cosine-trained-codes": {"quantizer": "cosine", "codebook_update": "gradient"},
}
STATIC = ("none", "identity")  # what owners on other ranks need not be asked for


def train(settings: dict, is_captured: bool, num_steps: int, overlap: bool = False) -> dict:
    """In a rank: steps of two microbatches; outputs, gradients and codes of each."""
    vq = VQConfig(**{**BASE, **settings, "overlap_table": overlap})
    new_graph = RecordedGraph if is_captured else None
    dtype = torch.float64 if vq.straight_through in STATIC else torch.float32
    drawn = {name: tensor.to(dtype) for name, tensor in draw_parameters(vq).items()}
    layer = build_layer(vq, drawn, new_graph=new_graph)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    found = []
    for _ in range(num_steps):
        for _ in range(2):
            x = torch.randn(3, 2, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
            x.requires_grad_()
            layer.start_ahead()
            output, _ = layer(x)
            output.square().sum().backward()
            found.append({"output": output.detach(), "x": x.grad})
        CodebookSync(finalize=None)([layer])
        found[-1] |= {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
        found[-1]["codes now"] = layer.assigner.codebook.codes.detach().clone()
        found[-1]["usage"] = layer.assigner.codebook.usage.clone()
        layer.zero_grad()
        with torch.no_grad():  # as an optimizer moves them, in place
            for parameter in layer.experts.parameters():
                parameter.mul_(0.97)
    path = layer.discrete_paths[0]
    is_used = getattr(path, "is_captured", False)
    return {"found": found, "is_captured": is_used}


def both_ways(settings: dict, overlap: bool = False) -> list[dict]:
    if overlap:
        return [train(settings, False, 3), train(settings, False, 3, overlap=True)]
    return [train(settings, False, 3), train(settings, True, 3)]


def check(plain: dict, other: dict) -> None:
    assert len(plain["found"]) == len(other["found"]) == 6
    for wanted, got in zip(plain["found"], other["found"], strict=True):
        assert set(wanted) == set(got)
        for name, tensor in wanted.items():
            scale = max(1.0, float(tensor.abs().max()))
            error = float((got[name] - tensor).abs().max()) / scale
            limit = 1e-12 if wanted["output"].dtype == torch.float64 else 2e-5
            assert error < limit, f"{name} differs by {error:.3g} (relative)"
