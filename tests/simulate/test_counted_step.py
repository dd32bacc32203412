"""A whole optimizer step on real gloo ranks sends exactly what the formulas say, call by call."""

from __future__ import annotations

import math

import pytest
from baseline_routers import ROUTERS
from counted_ranks import SIZES, count_and_plan
from fast_tier import only

ZERO = ["optimizer.use_distributed_optimizer=true"]
OVERLAP = [*ZERO, "optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"]
MANY_LAYERS = ["model.num_layers=4"]
ONE_EXPERT = ["model.num_moe_experts=1", "model.moe_router_topk=1"]
MEMORY = ["code_memory.num_rows=64", "code_memory.codes=embedding", "code_memory.num_codes=20"]
CASES = {
    # name: (ranks, layout, overrides)
    "one rank": (1, {}, []),
    "DP2": (2, {}, []),
    "DP2, distributed optimizer": (2, {}, ZERO),
    "EP2": (2, {"ep": 2}, []),
    "TP2": (2, {"tp": 2}, []),
    "ETP2": (2, {"etp": 2}, []),
    "PP2": (2, {"pp": 2}, []),
    "PP2, interleaved": (2, {"pp": 2, "vpp": 2}, MANY_LAYERS),
    "PP2, tied embeddings, per-token loss": (
        2,
        {"pp": 2},
        [
            *OVERLAP,
            "model.untie_embeddings_and_output_weights=false",
            "model.calculate_per_token_loss=true",
        ],
    ),
    "EP2, rows by token dispatch, everything recomputed": (
        2,
        {"ep": 2},
        [
            "vq.execution=tokens",
            "model.recompute_granularity=full",
            "model.recompute_method=uniform",
            "model.recompute_num_layers=1",
        ],
    ),
    "TP2 x EP2, bf16, trained codes, distributed optimizer": (
        4,
        {"tp": 2, "ep": 2},
        [*ZERO, "model.bf16=true", "vq.codebook_update=gradient", "vq.code_input=learned"],
    ),
    "TP2 x ETP2 x EP2, a dense layer, learned positions, global balance loss": (
        4,
        {"tp": 2, "etp": 2, "ep": 2},
        [
            "model.moe_layer_freq=2",
            "model.position_embedding_type=learned_absolute",
            "model.moe_router_load_balancing_type=global_aux_loss",
        ],
    ),
    "TP2 x PP2 x EP2, interleaved, all overlapped, recompute of experts": (
        4,
        {"tp": 2, "pp": 2, "vpp": 2, "ep": 2},
        [
            *MANY_LAYERS,
            *OVERLAP,
            "model.recompute_granularity=selective",
            "model.recompute_modules=[moe]",
        ],
    ),
    "TP2 x EP2, shared expert, recompute of experts": (
        4,
        {"tp": 2, "ep": 2},
        [
            "model.moe_shared_expert_intermediate_size=32",
            "model.add_bias_linear=false",
            "model.recompute_granularity=selective",
            "model.recompute_modules=[moe]",
        ],
    ),
    "TP2 x PP2, shared expert, distributed optimizer": (
        4,
        {"tp": 2, "pp": 2},
        [*ZERO, "model.moe_shared_expert_intermediate_size=32", "model.add_bias_linear=false"],
    ),
    "TP2 x ETP2, one expert": (
        4,
        {"tp": 2, "etp": 2},
        ["vq.path=continuous", *ONE_EXPERT],
    ),
    "EP4, discrete only, product codes": (
        4,
        {"ep": 4},
        ["vq.path=discrete", "vq.quantizer=product", "vq.num_code_slices=2"],
    ),
    "TP2 x PP2 x EP2, code memory with contexts, rows recomputed": (
        4,
        {"tp": 2, "pp": 2, "ep": 2},
        [
            *MEMORY,
            "code_memory.exchange=rows",
            "code_memory.num_context_codes=10",
            "code_memory.layers=[1]",
            "model.recompute_granularity=selective",
            "model.recompute_modules=[moe]",
        ],
    ),
    "TP2 x ETP2, code memory on hidden states, bf16": (
        2,
        {"tp": 2, "etp": 2},
        [*MEMORY, "code_memory.codes=hidden", "code_memory.gate=token", "model.bf16=true"],
    ),
    "EP2, code memory of tables and experts on random codes": (
        2,
        {"ep": 2},
        [
            *MEMORY,
            "code_memory.exchange=table",
            "code_memory.values=experts",
            "code_memory.codes=random",
        ],
    ),
    "TP2 x EP2, switch, everything recomputed": (
        4,
        {"tp": 2, "ep": 2},
        [
            *ROUTERS["switch"],
            "model.recompute_granularity=full",
            "model.recompute_method=uniform",
            "model.recompute_num_layers=1",
        ],
    ),
    "DP2 x TP2, loss-free router": (4, {"tp": 2}, ROUTERS["loss_free"]),
    "TP2, StableMoE": (2, {"tp": 2}, [*ROUTERS["stable_moe"], *ZERO]),
}


FAST = (
    "TP2 x PP2 x EP2, interleaved, all overlapped, recompute of experts",
    "EP4, discrete only, product codes",
    "TP2 x EP2, shared expert, recompute of experts",
    "TP2 x PP2 x EP2, code memory with contexts, rows recomputed",
    "TP2 x ETP2, code memory on hidden states, bf16",
)


@pytest.mark.distributed
@pytest.mark.parametrize("name", only(CASES, *FAST))
def test_a_step_sends_what_the_formulas_say(ranks, name: str) -> None:  # noqa: ANN001
    num_ranks, sizes, overrides = CASES[name]
    layout = {SIZES[short]: size for short, size in sizes.items()}
    of_ranks = ranks(num_ranks).run(count_and_plan, sizes, overrides, layout=layout)
    for found in of_ranks:
        assert found["balanced"] == found["balanced plan"]
        assert found["routed"] == found["routed plan"]
        assert math.isfinite(found["balanced loss"])
        assert math.isfinite(found["routed loss"])
    if num_ranks > 1:
        assert all(found["balanced"] for found in of_ranks)
