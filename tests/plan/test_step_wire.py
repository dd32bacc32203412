"""Whole-step wire bytes against amounts worked out by hand; real ranks are in tests/simulate."""

from __future__ import annotations

from pathlib import Path

import pytest

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.plan.chunk_wire import MeanTraffic
from vqmoe_megatron.plan.layout import check_layout
from vqmoe_megatron.plan.shape import LayerShape
from vqmoe_megatron.plan.step_wire import stage_wire, step_wire
from vqmoe_megatron.plan.wire import RowTraffic, StageWire, StepWire, Term, layer_terms, total_bytes

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "parity.yaml"
TP, PP, VPP, EP = (
    f"parallel.{name}_parallel_size"
    for name in ("tensor_model", "pipeline_model", "virtual_pipeline_model", "expert_model")
)
HIDDEN, LENGTH, LAYERS, VOCAB = 64, 32, 4, 256
BLOCK = LENGTH * HIDDEN * 4  # bytes of one sequence of hidden vectors in fp32


def recipe(*overrides: str) -> RunConfig:
    """The parity recipe with 250 words, which pad to 256, and two microbatches at one replica."""
    return load_recipe(RECIPE, ["model.vocab_size=250", "train.global_batch_size=2", *overrides])


def wire_of(num_ranks: int, *overrides: str) -> StepWire:
    config = recipe(*overrides)
    return step_wire(config, check_layout(config, num_ranks, "cpu"))


def of_part(stage: StageWire, part: str, collective: str) -> tuple[int, int]:
    terms = [t for t in stage.terms if t.part == part and t.collective == collective]
    return sum(t.num_calls for t in terms), sum(t.sent_bytes for t in terms)


def test_one_rank_sends_nothing() -> None:
    wire = wire_of(1)
    assert wire.sent_bytes == 0
    assert wire.stages[0].terms == ()
    assert wire.by_axis == {}


def test_tensor_parallel_layers() -> None:
    (stage,) = wire_of(2, f"{TP}=2").stages
    half = BLOCK // 2  # what one of two ranks sends of a sequence it holds half of
    # Per microbatch and layer: qkv gathers twice and scatters once, proj scatters and gathers.
    assert of_part(stage, "attention", "all_gather") == (2 * LAYERS * 3, 2 * LAYERS * 3 * half)
    assert of_part(stage, "attention", "reduce_scatter") == (2 * LAYERS * 2, 2 * LAYERS * 2 * half)
    assert of_part(stage, "embedding", "reduce_scatter") == (2, 2 * half)
    assert of_part(stage, "output", "all_gather") == (4, 4 * half)
    # Three fp32 numbers per token; an all-reduce over two ranks sends what it reduces.
    assert of_part(stage, "output", "all_reduce") == (6, 6 * LENGTH * 4)
    assert of_part(stage, "moe balance loss", "all_reduce") == (2 * LAYERS, 2 * LAYERS * 8 * 8)


def test_dense_layers_take_the_place_of_experts() -> None:
    (stage,) = wire_of(2, f"{TP}=2", "model.moe_layer_freq=2").stages
    half = BLOCK // 2
    num_dense = LAYERS // 2
    assert of_part(stage, "dense_mlp", "all_gather") == (6 * num_dense, 6 * num_dense * half)
    assert of_part(stage, "moe balance loss", "all_reduce")[0] == 2 * (LAYERS - num_dense)


def test_learned_positions_reduce_the_whole_sequence() -> None:
    (stage,) = wire_of(2, f"{TP}=2", "model.position_embedding_type=learned_absolute").stages
    assert of_part(stage, "embedding", "all_reduce") == (2, 2 * BLOCK)
    assert of_part(stage, "embedding", "reduce_scatter") == (0, 0)


def test_the_moe_layer_is_that_of_the_layer_model() -> None:
    config = recipe(f"{EP}=2", "train.global_batch_size=4")
    layout = check_layout(config, 2, "cpu")
    terms = layer_terms(LayerShape.from_config(config, layout))
    (stage,) = step_wire(config, layout).stages
    sent = sum(t.sent_bytes for t in stage.terms if t.axis == "ep")
    assert sent == LAYERS * 2 * total_bytes(terms)


def test_traffic_replaces_balance() -> None:
    config = recipe(f"{EP}=2", "train.global_batch_size=4")
    layout = check_layout(config, 2, "cpu")
    none = MeanTraffic(RowTraffic(0, 0, 64), RowTraffic(0, 0, 32))
    silent, balanced = stage_wire(config, layout, 0, none), stage_wire(config, layout, 0)
    rows = [t for t in silent.terms if t.part == "moe rows"]
    assert rows == []
    assert [t for t in balanced.terms if t.part == "moe rows"]
    rest = [t for t in silent.terms if t.axis != "ep"]
    assert rest == [t for t in balanced.terms if t.axis != "ep"]


@pytest.mark.parametrize(("method", "count"), [("uniform", 1), ("block", 1), ("block", 3)])
def test_recompute_repeats_forward_passes(method: str, count: int) -> None:
    full = [
        "model.recompute_granularity=full",
        f"model.recompute_method={method}",
        f"model.recompute_num_layers={count}",
    ]
    (stage,), (plain,) = wire_of(2, f"{TP}=2", *full).stages, wire_of(2, f"{TP}=2").stages
    repeated = LAYERS if method == "uniform" else count
    more = (
        of_part(stage, "attention", "all_gather")[0] - of_part(plain, "attention", "all_gather")[0]
    )
    assert more == 2 * repeated
    # The balance loss is taken once, in the second forward pass.
    assert of_part(stage, "moe balance loss", "all_reduce") == of_part(
        plain, "moe balance loss", "all_reduce"
    )


def test_selective_recompute_repeats_what_it_names() -> None:
    selective = ["model.recompute_granularity=selective", "model.recompute_modules=[moe]"]
    (stage,) = wire_of(2, f"{EP}=2", *selective).stages
    (plain,) = wire_of(2, f"{EP}=2").stages
    calls = of_part(stage, "moe rows", "all_to_all")[0], of_part(plain, "moe rows", "all_to_all")[0]
    assert calls == (6 * LAYERS, 4 * LAYERS)  # out and back, and once more


def test_pipeline_sends_every_chunk_but_the_last_forward() -> None:
    batch = "train.global_batch_size=8"
    first, last = wire_of(2, f"{PP}=2", batch).stages
    for stage in (first, last):
        assert of_part(stage, "pipeline", "send") == (8, 8 * BLOCK)
    first, last = wire_of(2, f"{PP}=2", f"{VPP}=2", batch).stages
    for stage in (first, last):  # two chunks one way, one the other
        assert of_part(stage, "pipeline", "send") == (24, 24 * BLOCK)
    assert of_part(last, "loss", "broadcast") == (1, 16)
    assert of_part(first, "loss", "broadcast") == (0, 0)


def test_inner_stages_send_both_ways() -> None:
    stages = wire_of(4, f"{PP}=4", "train.global_batch_size=8").stages
    assert [of_part(stage, "pipeline", "send")[0] for stage in stages] == [8, 16, 16, 8]


def test_tied_embeddings_add_their_gradients() -> None:
    tied = "model.untie_embeddings_and_output_weights=false"
    stages = wire_of(4, f"{PP}=4", tied, "train.global_batch_size=8").stages
    sent = [of_part(stage, "tied embeddings", "all_reduce") for stage in stages]
    assert sent == [(1, VOCAB * HIDDEN * 4), (0, 0), (0, 0), (1, VOCAB * HIDDEN * 4)]


def test_gradients_over_replicas() -> None:
    (plain,) = wire_of(2).stages
    (sharded,) = wire_of(2, "optimizer.use_distributed_optimizer=true").stages
    calls, sent = of_part(plain, "gradients", "all_reduce")
    assert calls == 2  # one buffer of dense gradients, one of experts
    scattered_calls, scattered = of_part(sharded, "gradients", "reduce_scatter")
    assert scattered_calls == 2
    assert sent <= 2 * scattered < sent + 2 * 4 * (128 + 64 * 100)  # padding, and nothing else


def test_parameters_are_gathered_twice_unless_overlapped() -> None:
    zero = "optimizer.use_distributed_optimizer=true"
    overlap = ["optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"]
    wire = wire_of(2, zero)
    (twice,), (once,) = wire.stages, wire_of(2, zero, *overlap).stages
    calls, sent = of_part(twice, "parameters", "all_gather")
    assert (calls, sent) == tuple(2 * n for n in of_part(once, "parameters", "all_gather"))
    assert sent == 2 * of_part(once, "gradients", "reduce_scatter")[1]  # fp32, both padded alike
    assert any("gathered twice" in sentence for sentence in wire.assumptions)


def test_the_bf16_gather_is_half_of_the_fp32_reduction() -> None:
    overrides = ["optimizer.use_distributed_optimizer=true", "model.bf16=true"]
    (stage,) = wire_of(2, *overrides, "vq.codebook_update=ema").stages
    gathered = of_part(stage, "parameters", "all_gather")[1]
    assert gathered == of_part(stage, "gradients", "reduce_scatter")[1]  # twice a half


def test_codebook_statistics_are_one_call() -> None:
    (stage,) = wire_of(2).stages
    of_layer = 8 + 2 + 3 + 16 + 16 * HIDDEN + 16 * HIDDEN  # N, gate, losses, usage, sums, M
    assert of_part(stage, "codebook statistics", "all_reduce") == (1, LAYERS * of_layer * 4)
    (stage,) = wire_of(2, "vq.path=continuous").stages
    assert of_part(stage, "codebook statistics", "all_reduce") == (1, LAYERS * (8 + 2) * 4)


def test_per_token_loss_shares_its_count() -> None:
    stages = wire_of(4, f"{PP}=2", "model.calculate_per_token_loss=true").stages
    assert [of_part(s, "token count", "broadcast") for s in stages] == [(0, 0), (1, 4)]
    assert [of_part(s, "token count", "all_reduce") for s in stages] == [(1, 4), (1, 4)]


def test_a_wire_is_judged_by_its_busiest_stage() -> None:
    small = StageWire(0, (Term("a", "send", "pp", 5), Term("b", "all_reduce", "tp", 1)))
    large = StageWire(1, (Term("a", "send", "pp", 9, 2),))
    wire = StepWire((small, large), ())
    assert wire.sent_bytes == 9
    assert wire.by_axis == {"tp": 1, "pp": 9}
    assert small.by_collective == {("all_reduce", "tp"): (1, 1), ("send", "pp"): (1, 5)}


def test_an_unknown_vocabulary_is_refused() -> None:
    config = load_recipe(RECIPE, [f"{PP}=2"])
    with pytest.raises(ValueError, match="model.vocab_size is not set"):
        step_wire(config, check_layout(config, 2, "cpu"))
