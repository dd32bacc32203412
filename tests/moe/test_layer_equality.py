"""The distributed layer equals the oracle: output and every gradient, by name, in fp64.

Every rank has its own tokens; the oracle has them all. The loss on a rank is sum(y * g) over its
tokens plus the VQ loss, so summing gradients over ranks gives

    sum over ALL tokens of y * g  +  sum over ranks of the rank's VQ loss.

The VQ loss is a mean over the T / W tokens of a rank, so with equal token counts the second term is
W times the mean over all tokens. Under sequence parallelism the layer divides it by TP, because
there the shards of one sequence are summed: W / TP = DP times the global mean. Hence the factor DP.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import pytest
import torch
from fast_tier import covering, spread, tiered
from megatron_experts import stack_gradients, use_megatron_experts
from tiny_layer import (
    ACTIVATIONS,
    CUT,
    HIDDEN,
    NUM_EXPERTS,
    SHARED_FFN,
    build_layer,
    draw_parameters,
    expert_place,
    join_experts,
    join_shared,
)

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.vq.code_map import build_code_map
from vqmoe_megatron.vq.oracle import OracleResult, vqmoe_oracle

pytestmark = pytest.mark.distributed

NUM_TOKENS = 24  # over all ranks
# bf16 rounds at 2^-9, in about ten places between a token and a gradient.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}
TP, EP, ETP = (
    f"{name}_parallel_size" for name in ("tensor_model", "expert_model", "expert_tensor")
)
LAYOUTS = {
    "1rank": (1, {}),
    "ep2": (4, {EP: 2}),  # and two replicas of every expert
    "ep4": (4, {EP: 4}),
    "tp2ep2": (4, {TP: 2, EP: 2}),
}
# Sharded experts: TP below, equal to and above ETP; and TP alone, where experts are replicas.
EXPERT_TENSOR_LAYOUTS = {
    "tp2": (2, {TP: 2}),
    "etp2": (2, {ETP: 2}),
    "etp4": (4, {ETP: 4}),
    "tp2etp2": (4, {TP: 2, ETP: 2}),  # and two replicas of every shard
    "tp4etp2": (4, {TP: 4, ETP: 2}),
    "ep2etp2": (4, {EP: 2, ETP: 2}),
    "tp2ep2etp2": (4, {TP: 2, EP: 2, ETP: 2}),
}
# Gradient-trained codes, so that the codebook has a gradient to compare; wide gate, so that both
# paths weigh in; the numbers of codes are N, 4 N, and one that N does not divide.
BASE = {"codebook_update": "gradient", "init": "uniform", "dead_code_threshold": 0.0}
NUM_CODES = (NUM_EXPERTS, 4 * NUM_EXPERTS, 2 * NUM_EXPERTS + 2)

MATRIX = list(
    product(
        [
            ("code", "tokens"),
            ("code", "code_space"),
            ("blend", "tokens"),
            ("blend_convex", "tokens"),
            ("token", "tokens"),
        ],
        ("none", "separate", "shared"),
        NUM_CODES,
        ("1rank", "ep2", "ep4"),
    )
)
PRODUCT = {"quantizer": "product", "num_codes": 8}
RESIDUAL = {"quantizer": "residual", "num_code_slices": 2, "num_codes": 10}
TRAINED = {"quantizer": "low_dim", "code_dim": 4, "train_projection": True}
IMPLICIT = {"codebook_update": "gradient", "freeze_codebook": True}
FSQ = {**IMPLICIT, "quantizer": "fsq", "code_dim": 3, "fsq_levels": [3, 2, 5], "num_codes": 30}
LFQ = {**IMPLICIT, "quantizer": "lfq", "code_dim": 4, "num_codes": 16}
TOKEN_VARIANTS = {
    "discrete": {"vq": {"path": "discrete"}},
    "discrete-blend": {"vq": {"path": "discrete", "expert_input": "blend"}},
    "continuous": {"vq": {"path": "continuous"}},
    "continuous-top2": {"vq": {"path": "continuous"}, "topk": 2, "pre_softmax": False},
    "sigmoid": {"vq": {"combine": "sigmoid"}},
    "straight-through-identity": {"vq": {"straight_through": "identity"}},
    "straight-through-none": {"vq": {"straight_through": "none"}},
    "gated-silu": {"activation": "silu", "gated": True, "bias": False},
    "gated-silu-bias": {"activation": "silu", "gated": True},
    "relu": {"activation": "relu"},
    "relu-no-bias": {"activation": "relu", "bias": False},
    "top2-pre-softmax": {"topk": 2},
    "top2-post-softmax": {"topk": 2, "pre_softmax": False},
    "product-2": {"vq": {"quantizer": "product", "num_code_slices": 2, "num_codes": 8}},
    "product-4": {"vq": {"quantizer": "product", "num_code_slices": 4, "num_codes": 8}},
    "product-4-blend": {
        "vq": {
            "quantizer": "product",
            "num_code_slices": 4,
            "num_codes": 8,
            "expert_input": "blend",
        }
    },
    "product-2-identity": {
        "vq": {
            "quantizer": "product",
            "num_code_slices": 2,
            "num_codes": 8,
            "straight_through": "identity",
            "norm": "none",
        }
    },
    "cosine": {"vq": {"quantizer": "cosine"}},
    "cosine-token": {"vq": {"quantizer": "cosine", "expert_input": "token"}},
    "balanced": {"vq": {"code_map": "balanced"}},
    "clustered": {"vq": {"code_map": "clustered"}},
    "ema": {"vq": {"codebook_update": "ema"}},
    "frozen": {"vq": {"freeze_codebook": True}},
    "rms-norm": {"normalization": "RMSNorm"},
    "one-code": {"routing": "one code"},
    "one-code-one-expert": {"routing": "one expert"},
    "no-vq-loss": {"vq": {"vq_loss_coeff": 0.0}},
    "recompute": {"recompute": True},
    "fp32": {"dtype": torch.float32},
    "fp32-gated-product": {
        "vq": {"quantizer": "product", "num_code_slices": 2, "num_codes": 8},
        "activation": "silu",
        "gated": True,
        "dtype": torch.float32,
    },
    "fp32-one-expert": {"routing": "one expert", "dtype": torch.float32},
    "straight-through-group": {"vq": {"straight_through": "group"}},
    "discrete-group": {"vq": {"path": "discrete", "straight_through": "group", "norm": "shared"}},
    "product-2-group": {"vq": {**PRODUCT, "num_code_slices": 2, "straight_through": "group"}},
    "product-8": {"vq": {**PRODUCT, "num_code_slices": 8}},
    "product-8-discrete": {"vq": {**PRODUCT, "num_code_slices": 8, "path": "discrete"}},
    "learned": {"vq": {"code_input": "learned"}},
    "learned-discrete-no-norm": {
        "vq": {"code_input": "learned", "path": "discrete", "norm": "none"}
    },
    "learned-product-2": {"vq": {**PRODUCT, "code_input": "learned", "num_code_slices": 2}},
    "learned-product-4-group": {
        "vq": {
            **PRODUCT,
            "code_input": "learned",
            "num_code_slices": 4,
            "straight_through": "group",
        },
        "activation": "silu",
        "gated": True,
    },
    "low-dim": {"vq": {"quantizer": "low_dim", "code_dim": 5}},
    "low-dim-discrete-group": {
        "vq": {
            "quantizer": "low_dim",
            "code_dim": 3,
            "path": "discrete",
            "straight_through": "group",
        }
    },
    "low-dim-identity": {
        "vq": {"quantizer": "low_dim", "code_dim": 4, "straight_through": "identity"}
    },
    "low-dim-learned": {"vq": {"quantizer": "low_dim", "code_dim": 4, "code_input": "learned"}},
    "low-dim-blend": {"vq": {"quantizer": "low_dim", "code_dim": 4, "expert_input": "blend"}},
    "cosine-scale": {"vq": {"quantizer": "cosine", "learn_code_scale": True}},
    "cosine-scale-ema": {
        "vq": {"quantizer": "cosine", "learn_code_scale": True, "codebook_update": "ema"}
    },
    "low-dim-trained": {"vq": {"quantizer": "low_dim", "code_dim": 5, "train_projection": True}},
    "low-dim-trained-group": {"vq": {**TRAINED, "straight_through": "group", "norm": "none"}},
    "low-dim-trained-identity": {"vq": {**TRAINED, "straight_through": "identity"}},
    "low-dim-trained-learned": {"vq": {**TRAINED, "code_input": "learned"}},
    "low-dim-trained-blend": {"vq": {**TRAINED, "expert_input": "blend"}},
    "residual": {"vq": RESIDUAL},
    "residual-3-group": {
        "vq": {**RESIDUAL, "num_code_slices": 3, "straight_through": "group", "norm": "shared"}
    },
    "residual-discrete-identity": {
        "vq": {**RESIDUAL, "path": "discrete", "straight_through": "identity", "norm": "none"}
    },
    "residual-learned": {"vq": {**RESIDUAL, "code_input": "learned"}},
    "residual-blend": {"vq": {**RESIDUAL, "expert_input": "blend"}},
    "residual-token": {"vq": {**RESIDUAL, "expert_input": "token"}},
    "residual-ema-no-commitment": {
        "vq": {**RESIDUAL, "codebook_update": "ema", "commitment_coeff": 0.0}
    },
    "residual-recompute-fp32": {"vq": RESIDUAL, "recompute": True, "dtype": torch.float32},
    "fsq": {"vq": FSQ},
    "fsq-trained-group": {"vq": {**FSQ, "train_projection": True, "straight_through": "group"}},
    "fsq-identity-no-losses": {"vq": {**FSQ, "straight_through": "identity", "vq_loss_coeff": 0.0}},
    "fsq-blend": {"vq": {**FSQ, "expert_input": "blend"}},
    "fsq-learned": {"vq": {**FSQ, "code_input": "learned"}},
    "lfq": {"vq": LFQ},
    "lfq-trained-discrete": {"vq": {**LFQ, "train_projection": True, "path": "discrete"}},
    "lfq-group-no-entropy": {"vq": {**LFQ, "straight_through": "group", "entropy_loss_coeff": 0.0}},
    "lfq-token-entropy-alone": {
        "vq": {**LFQ, "expert_input": "token", "vq_loss_coeff": 0.0, "entropy_loss_coeff": 0.3}
    },
    "learned-none": {"vq": {"code_input": "learned", "straight_through": "none"}},
    "64-codes-per-expert": {"vq": {"num_codes": 64 * NUM_EXPERTS}},
    "fewer-codes-than-experts": {"vq": {"num_codes": NUM_EXPERTS - 1}},
    **{
        f"shared-expert{suffix}": {"shared": True, "bias": False, **case}
        for suffix, case in {
            "": {},
            "-sigmoid-gated": {"vq": {"combine": "sigmoid"}, "activation": "silu", "gated": True},
            "-discrete": {"vq": {"path": "discrete"}},
            "-continuous-recompute": {"vq": {"path": "continuous"}, "recompute": True},
        }.items()
    },
    # without biases, which Megatron's own experts add in a way that this torch refuses
    "megatron-experts": {"megatron_experts": True, "bias": False},
    "megatron-experts-gated-group": {
        "megatron_experts": True,
        "vq": {"straight_through": "group"},
        "activation": "silu",
        "gated": True,
        "bias": False,
    },
}
# Every case again in code space where that is exact, and there with one table per step.
CODE_VARIANTS = {
    f"{name}-{suffix}": {**case, "vq": {**case.get("vq", {}), **execution}}
    for suffix, execution in (
        ("code-space", {"execution": "code_space"}),
        ("table-per-step", {"execution": "code_space", "table_per_step": True}),
    )
    for name, case in TOKEN_VARIANTS.items()
    if case.get("vq", {}).get("path") != "continuous"
    and case.get("vq", {}).get("expert_input", "code") == "code"
}
FILLED = {"path": "filled"}
THRESHOLD = {**FILLED, "threshold_routing": True}
TAU = 0.45  # tau at which some tokens have no exact expert, some one, some two
FILLED_VARIANTS = {
    "filled": {"vq": FILLED},
    "filled-top2-of-3": {"vq": {**FILLED, "num_fill_experts": 3}, "topk": 2},
    "filled-1": {"vq": {**FILLED, "num_fill_experts": 1}},  # the chosen one: nothing is filled
    "filled-detached": {"vq": {**FILLED, "fill_values": "detached"}},
    "filled-direct": {"vq": {**FILLED, "fill_values": "direct"}},
    "filled-cosine": {"vq": {**THRESHOLD, "quantizer": "cosine"}, "tau": 0.5},
    "filled-low-dim": {"vq": {**THRESHOLD, "quantizer": "low_dim", "code_dim": 5}, "tau": TAU},
    "filled-fsq": {"vq": {**THRESHOLD, **FSQ}, "tau": 0.2},
    "filled-lfq-trained": {"vq": {**FILLED, **LFQ, "train_projection": True}},
    "filled-per-step": {"vq": {**FILLED, "table_per_step": True}},
    "filled-per-step-direct": {
        "vq": {**FILLED, "table_per_step": True, "fill_values": "direct", "num_fill_experts": 2}
    },
    "filled-per-step-detached": {
        "vq": {**FILLED, "table_per_step": True, "fill_values": "detached"}
    },
    "filled-gated-silu": {"vq": FILLED, "activation": "silu", "gated": True},
    "filled-recompute": {"vq": THRESHOLD, "tau": TAU, "recompute": True},
    "threshold": {"vq": THRESHOLD, "tau": TAU},
    "threshold-2": {"vq": {**THRESHOLD, "num_fill_experts": 2}, "tau": TAU},
    "threshold-no-fill": {"vq": {**THRESHOLD, "num_fill_experts": 0}, "tau": TAU},
    "threshold-direct": {"vq": {**THRESHOLD, "fill_values": "direct"}, "tau": TAU},
    "threshold-per-step": {"vq": {**THRESHOLD, "table_per_step": True}, "tau": TAU},
    "threshold-not-set": {"vq": THRESHOLD},
    "threshold-of-nobody": {"vq": THRESHOLD, "tau": 1e6},  # not a single row travels
    "threshold-fp32": {"vq": THRESHOLD, "tau": TAU, "dtype": torch.float32},
}
VARIANTS = (
    {
        name: {**case, "vq": {"execution": "tokens", **case.get("vq", {})}}
        for name, case in TOKEN_VARIANTS.items()
    }
    | CODE_VARIANTS
    | FILLED_VARIANTS
)
EXPERT_TENSOR_VARIANTS = tuple(
    name
    for name in VARIANTS
    if name.removesuffix("-code-space").removesuffix("-table-per-step")
    in (
        "discrete",
        "continuous-top2",
        "gated-silu",
        "gated-silu-bias",
        "relu",
        "relu-no-bias",
        "product-4",
        "shared-expert",
        "shared-expert-sigmoid-gated",
        "one-code-one-expert",  # most ranks receive no row
        "recompute",
        "fp32-gated-product",
        "fp32-one-expert",
        "straight-through-group",
        "learned-product-4-group",
        *("filled", "filled-detached", "filled-direct", "filled-per-step-direct", "threshold"),
        *("threshold-no-fill", "threshold-of-nobody"),
    )
)
# Without a router; and the discrete path beside it.
ONE_EXPERT_VARIANTS = {
    "dense": {"vq": {"path": "continuous"}},
    "dense-gated-shared": {
        "vq": {"path": "continuous"},
        "activation": "silu",
        "gated": True,
        "bias": False,
        "shared": True,
    },
    "dense-recompute-fp32": {
        "vq": {"path": "continuous"},
        "recompute": True,
        "dtype": torch.float32,
    },
    "dual-tokens": {"vq": {"execution": "tokens"}},
    "dual-code-space": {"vq": {"execution": "code_space", "straight_through": "group"}},
    "dual-table-per-step": {"vq": {"execution": "code_space", "table_per_step": True}},
    "discrete": {"vq": {"path": "discrete"}},
}
ONE_EXPERT_LAYOUTS = ("1rank", "tp2", "etp2", "tp2etp2", "tp4etp2")


def settings(case: dict) -> VQConfig:
    chosen = {**BASE, "num_codes": 3 * NUM_EXPERTS, **case.get("vq", {})}
    if chosen.get("code_map", "mod") != "mod":
        chosen["init"] = "data"  # such a map is built from data; here it is given with the codes
    return VQConfig(**chosen)


def drawn(case: dict) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The parameters, all tokens [T, H] and the weights g [T, H] of the loss."""
    vq = settings(case)
    dtype = case.get("dtype", torch.float64)
    parameters = draw_parameters(
        vq,
        gated=case.get("gated", False),
        bias=case.get("bias", True),
        normalization=case.get("normalization", "LayerNorm"),
        num_experts=case.get("num_experts", NUM_EXPERTS),
        shared=case.get("shared", False),
    )
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(NUM_TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weights = torch.randn(NUM_TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    if case.get("routing") is not None:  # every token is nearest to code 1, which expert 1 serves
        parameters["assigner.codebook.codes"] += 50.0
        parameters["assigner.codebook.codes"][:, 1] -= 50.0
    if case.get("routing") == "one expert":  # the router agrees: three experts see no row at all
        parameters["router.bias"] += torch.tensor([0.0, 50.0, 0.0, 0.0], dtype=torch.float64)
    if vq.code_map != "mod":
        codes = parameters["assigner.codebook.codes"]
        load = torch.arange(codes.shape[0] * codes.shape[1]).view(codes.shape[:2]) ** 2
        parameters["assigner.code_map.expert_of_row"] = build_code_map(
            vq.code_map, codes, load, NUM_EXPERTS
        )
    parameters = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in parameters.items()
    }
    return parameters, x.to(dtype), weights.to(dtype)


def evaluate_layer(case: dict) -> dict:
    """In a rank: this rank's tokens through a real layer, forward and backward."""
    from megatron.core import parallel_state

    parameters, x, weights = drawn(case)
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    changes = {}
    if case.get("recompute"):
        changes = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    if x.dtype == torch.bfloat16:
        changes |= {"bf16": True, "params_dtype": x.dtype, "moe_router_dtype": "fp32"}
    if case.get("shared"):
        changes |= {"moe_shared_expert_intermediate_size": SHARED_FFN}
    layer = build_layer(
        settings(case),
        parameters,
        moe_router_topk=case.get("topk", 1),
        moe_router_pre_softmax=case.get("pre_softmax", True),
        activation_func=ACTIVATIONS[case.get("activation", "gelu")],
        gated_linear_unit=case.get("gated", False),
        add_bias_linear=case.get("bias", True),
        normalization=case.get("normalization", "LayerNorm"),
        num_moe_experts=case.get("num_experts", NUM_EXPERTS),
        **changes,
    )
    if case.get("megatron_experts"):
        use_megatron_experts(layer)
    if "tau" in case:
        layer.threshold.tau.fill_(case["tau"])
    own = x.chunk(world)[rank].clone().requires_grad_()
    output, bias = layer(own.view(-1, 2, HIDDEN))  # [S, B = 2, H]
    assert bias is None
    output = output.reshape(-1, HIDDEN)
    (output * weights.chunk(world)[rank]).sum().backward()
    layer.finish_table()
    if case.get("megatron_experts"):
        stack_gradients(layer)
    gradients = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return {
        "output": output.detach(),
        "x": own.grad,
        "gradients": gradients,
        "expert_place": expert_place(),
        "tensor_place": parallel_state.get_tensor_model_parallel_rank(),
        "trained": [n for n, p in layer.named_parameters() if p.requires_grad],
        "data_parallel_size": parallel_state.get_data_parallel_world_size(),
    }


def gathered(results: list[dict]) -> dict[str, torch.Tensor]:
    """Output and gradients of the whole world: tokens concatenated, parameters summed over ranks,
    experts summed over their replicas and put together."""
    found = {
        "output": torch.cat([r["output"] for r in results]),
        "gradient of x": torch.cat([r["x"] for r in results]),
    }
    for name in results[0]["gradients"]:
        if name.startswith(CUT):
            cuts: dict[tuple[int, int], torch.Tensor] = {}
            for r in results:
                place = r["expert_place"]
                cuts[place] = cuts.get(place, 0.0) + r["gradients"][name]
            found[name] = join_experts(name, cuts)
        elif name.startswith("shared_experts."):
            shards: dict[int, torch.Tensor] = {}
            for r in results:
                shard = r["tensor_place"]
                shards[shard] = shards.get(shard, 0.0) + r["gradients"][name]
            found[name] = join_shared(name, shards)
        else:
            found[name] = torch.stack([r["gradients"][name] for r in results]).sum(dim=0)
    return found


def run_oracle(case: dict, trained: list[str], data_parallel_size: int):  # noqa: ANN201
    """The oracle's output and gradients of the same loss, and its result."""
    parameters, x, weights = drawn(case)
    if x.dtype == torch.bfloat16:  # the same rounded numbers, from there on in fp32
        x, weights = x.float(), weights.float()
        parameters = {n: v.float() if v.is_floating_point() else v for n, v in parameters.items()}
    x.requires_grad_()
    for name in trained:
        parameters[name].requires_grad_()
    result = vqmoe_oracle(
        x,
        parameters,
        settings(case),
        num_experts=case.get("num_experts", NUM_EXPERTS),
        topk=case.get("topk", 1),
        pre_softmax=case.get("pre_softmax", True),
        activation=ACTIVATIONS[case.get("activation", "gelu")],
        gated=case.get("gated", False),
        normalization=case.get("normalization", "LayerNorm"),
        replicas=[t * data_parallel_size // NUM_TOKENS for t in range(NUM_TOKENS)],
        tau=case.get("tau"),
    )
    ((result.output * weights).sum() + data_parallel_size * result.vq_loss).backward()
    expected = {"output": result.output.detach(), "gradient of x": x.grad}
    expected |= {name: parameters[name].grad for name in trained}
    return expected, result


def check_equal(case: dict, ranks, layout: str) -> OracleResult:  # noqa: ANN001
    world_size, sizes = (LAYOUTS | EXPERT_TENSOR_LAYOUTS)[layout]
    results = ranks(world_size).run(evaluate_layer, case, layout=sizes)
    found = gathered(results)
    expected, oracle = run_oracle(case, results[0]["trained"], results[0]["data_parallel_size"])
    tolerance = TOLERANCE[case.get("dtype", torch.float64)]
    assert {n for n, e in expected.items() if e is not None} == set(found)
    for name, value in found.items():
        scale = max(1.0, float(expected[name].abs().max()))
        error = float((value - expected[name]).abs().max()) / scale
        assert error < tolerance, f"{name} differs by {error:.3g} (relative)"
    return oracle


@pytest.mark.parametrize(
    ("source", "norm", "num_codes", "layout"),
    tiered(MATRIX, covering(MATRIX), [f"{'-'.join(c[0])}-{c[1]}-{c[2]}-{c[3]}" for c in MATRIX]),
)
def test_matrix(source, norm: str, num_codes: int, layout: str, ranks) -> None:  # noqa: ANN001
    names = ("expert_input", "execution", "norm", "num_codes")
    check_equal({"vq": dict(zip(names, (*source, norm, num_codes), strict=True))}, ranks, layout)


def at_layouts(names: Iterable[str], layouts: Iterable[str]) -> list:
    """Every name at one layout after the other, which the fast tier runs, and at the last one,
    which has the most kinds of communication."""
    *_, last = layouts = tuple(layouts)
    chosen = spread(names, layouts)
    wanted = {*chosen, *((name, last) for name in names)}
    cases = [(name, layout) for layout in layouts for name in names if (name, layout) in wanted]
    return tiered(cases, chosen, [f"{layout}-{name}" for name, layout in cases])


@pytest.mark.parametrize(("name", "layout"), at_layouts(VARIANTS, LAYOUTS))
def test_variant(name: str, layout: str, ranks) -> None:  # noqa: ANN001
    oracle = check_equal(VARIANTS[name], ranks, layout)
    if VARIANTS[name].get("routing") is not None:
        assert oracle.codes.unique().tolist() == [1]
        assert oracle.experts.unique().tolist() == [1]
    if VARIANTS[name].get("tau") == TAU:  # or the case would show less than it says
        assert {len(experts) for experts in oracle.chosen} >= {0, 1, 2}


@pytest.mark.parametrize(
    ("name", "layout"), at_layouts(EXPERT_TENSOR_VARIANTS, EXPERT_TENSOR_LAYOUTS)
)
def test_sharded_experts(name: str, layout: str, ranks) -> None:  # noqa: ANN001
    check_equal(VARIANTS[name], ranks, layout)


@pytest.mark.parametrize(("name", "layout"), at_layouts(ONE_EXPERT_VARIANTS, ONE_EXPERT_LAYOUTS))
def test_one_expert(name: str, layout: str, ranks) -> None:  # noqa: ANN001
    check_equal({**ONE_EXPERT_VARIANTS[name], "num_experts": 1}, ranks, layout)


BF16_CASES = {
    "tokens": {"execution": "tokens"},
    "code-space": {"execution": "code_space"},
    "table-per-step": {"execution": "code_space", "table_per_step": True},
    "blend": {"execution": "tokens", "expert_input": "blend"},
    "group": {"execution": "code_space", "straight_through": "group"},
    "learned": {"execution": "code_space", "code_input": "learned"},
    "product": {**PRODUCT, "execution": "code_space", "num_code_slices": 2},
    "low-dim": {"execution": "code_space", "quantizer": "low_dim", "code_dim": 5},
    "discrete": {"execution": "code_space", "path": "discrete"},
    "continuous": {"path": "continuous"},
    "filled": FILLED,
    "filled-direct": {**FILLED, "fill_values": "direct", "table_per_step": True},
}


@pytest.mark.parametrize(("name", "layout"), at_layouts(BF16_CASES, LAYOUTS))
def test_bf16_is_the_fp32_oracle_within_bf16(name: str, layout: str, ranks) -> None:  # noqa: ANN001
    """Every execution, output and every gradient by name; codes are fp32 and follow an EMA, since
    trained ones want a parameter group of their own in bf16."""
    case = {"vq": {**BF16_CASES[name], "codebook_update": "ema"}, "dtype": torch.bfloat16}
    check_equal(case, ranks, layout)
