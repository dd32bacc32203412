"""Codebooks over ranks and steps: the same as on one rank, and bit-equal on all replicas.

How tokens are dealt is in ``dealt_microbatches``.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from dealt_microbatches import (
    BATCH,
    LAYOUTS,
    NUM_MICROBATCHES,
    SEQUENCE,
    microbatches,
    own_microbatches,
)
from fast_tier import spread, tiered
from tiny_layer import (
    HIDDEN,
    build_layer,
    draw_parameters,
    expert_place,
    join_experts,
)

from vqmoe_megatron.config import VQConfig

pytestmark = pytest.mark.distributed

NUM_STEPS = 4
BASE = {"num_codes": 12, "ema_decay": 0.8, "dead_code_threshold": 0.7}


UPDATES = list(product(("ema", "reanchor", "gradient"), LAYOUTS))
INITS = list(product(("data", "kmeans"), ("mod", "balanced", "clustered")))


def codebook_state(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    assigner = layer.assigner
    state = {f"codebook.{n}": v.clone() for n, v in assigner.codebook.state_dict().items()}
    return state | {"expert_of_row": assigner.code_map.expert_of_row.clone()}


def train_codebooks(settings: dict, num_steps: int) -> dict:
    """In a rank: forward, backward and synchronise for some steps; no optimizer."""
    from vqmoe_megatron.moe import synchronize_codebooks

    vq = VQConfig(**{**BASE, **settings})
    parameters = {n: p.float() for n, p in draw_parameters(vq).items()}
    layer = build_layer(vq, parameters)
    history = []
    for step in microbatches(num_steps):
        for x in own_microbatches(step):
            output, _ = layer(x)
            output.sum().backward()
        (statistics,) = synchronize_codebooks([layer])
        history.append(
            {
                "usage": statistics.code_usage,
                "load": statistics.expert_load,
                "scalars": statistics.scalars,
            }
        )
    return {"state": codebook_state(layer), "history": history}


def check_layouts(ranks, settings: dict, layout: str) -> list[dict]:  # noqa: ANN001
    (alone,) = ranks(1).run(train_codebooks, settings, NUM_STEPS)
    together = ranks(4).run(train_codebooks, settings, NUM_STEPS, layout=LAYOUTS[layout])
    for rank in together[1:]:
        for name, value in rank["state"].items():
            assert torch.equal(value, together[0]["state"][name]), f"replicas differ in {name}"
    for name, value in together[0]["state"].items():
        expected = alone["state"][name].double()
        assert float((value.double() - expected).abs().max()) < 1e-5, name
    for found, expected in zip(together[0]["history"], alone["history"], strict=True):
        assert torch.equal(found["usage"], expected["usage"])  # counts are exact
        assert torch.equal(found["load"], expected["load"])
        for name, value in expected["scalars"].items():
            torch.testing.assert_close(found["scalars"][name], value, rtol=1e-5, atol=1e-6)
    return alone["history"]


@pytest.mark.parametrize(
    ("update", "layout"),
    tiered(UPDATES, spread([*("ema", "reanchor", "gradient") * 2][: len(LAYOUTS)], LAYOUTS)),
)
def test_statistics_and_codebooks_do_not_depend_on_the_layout(
    ranks,
    layout: str,
    update: str,  # noqa: ANN001
) -> None:
    history = check_layouts(ranks, {"codebook_update": update}, layout)
    num_tokens = NUM_MICROBATCHES * SEQUENCE * BATCH
    for step in history:
        assert float(step["usage"].sum()) == num_tokens
        assert float(step["load"].sum()) == 2 * num_tokens  # top-1 and one code
    if update != "reanchor":
        assert sum(float(s["scalars"]["revived_codes"]) for s in history) > 0


@pytest.mark.parametrize(
    ("init", "code_map"),
    tiered(INITS, [("data", "mod"), ("kmeans", "balanced"), ("data", "clustered")]),
)
def test_data_init_does_not_depend_on_the_layout(ranks, init: str, code_map: str) -> None:  # noqa: ANN001
    settings = {"init": init, "code_map": code_map}
    check_layouts(ranks, settings, "tp2ep2")
    check_layouts(ranks, settings, "dp2ep2")


def test_product_codes_synchronise_too(ranks) -> None:  # noqa: ANN001
    settings = {"quantizer": "product", "num_code_slices": 2, "num_codes": 8}
    check_layouts(ranks, settings, "tp2ep2")


ERRORS = list(product(("ema", "gradient"), LAYOUTS))


@pytest.mark.parametrize(
    ("update", "layout"), tiered(ERRORS, [("ema", "tp2ep2"), ("gradient", "dp2ep2")])
)
def test_revival_by_error_from_several_microbatches_and_freezing_do_not_depend_on_the_layout(
    ranks,
    layout: str,
    update: str,  # noqa: ANN001
) -> None:
    """30 codes need the tokens of three microbatches of 12."""
    settings = {"codebook_update": update, "num_codes": 30, "revival": "error"}
    settings |= {"freeze_after_steps": 3, "dead_code_threshold": 0.95}
    history = check_layouts(ranks, settings, layout)
    revived = [float(step["scalars"]["revived_codes"]) for step in history]
    assert max(revived) > 12 and revived[3] == 0
    assert [float(step["scalars"]["codebook_frozen"]) for step in history] == [0, 0, 0, 1]


def offered(num_codes: int) -> list:
    """In a rank: the reduced candidates of a step, and its tokens in the order of microbatches."""
    from vqmoe_megatron.moe.codebook_sync import reduce_statistics

    layer = build_layer(VQConfig(**{**BASE, "num_codes": num_codes, "init": "uniform"}))
    (step,) = microbatches(1)
    for x in own_microbatches(step):
        layer(x)[0].sum().backward()
    reduce_statistics([layer], [layer])
    return [layer.sums.parts[-1][:, 0], step.reshape(-1, HIDDEN)]


OFFERS = list(product((12, 30, 60), LAYOUTS))


@pytest.mark.parametrize(
    ("num_codes", "layout"), tiered(OFFERS, [(12, "tp2ep2"), (30, "tp2ep2"), (60, "dp2ep2")])
)
def test_candidates_are_as_many_different_tokens_as_there_are(
    ranks,
    layout: str,
    num_codes: int,  # noqa: ANN001
) -> None:
    for candidates, tokens in ranks(4).run(offered, num_codes, layout=LAYOUTS[layout]):
        assert torch.equal(candidates[:24], tokens[:24][: len(candidates)])
        is_filled = candidates.any(dim=1)
        assert int(is_filled.sum()) == min(num_codes, len(tokens))  # 48 tokens for 60 codes
        assert len(candidates[is_filled].unique(dim=0)) == int(is_filled.sum())


def first_codes(settings: dict) -> dict:
    """In a rank: the codes that the first microbatch gives, and that microbatch."""
    layer = build_layer(VQConfig(**{**BASE, **settings}))
    own = own_microbatches(microbatches(1)[0])
    for x in own:
        layer(x)
    return {"codes": layer.assigner.codebook.codes.detach()}


def test_data_codes_are_tokens_of_the_first_global_microbatch(ranks) -> None:  # noqa: ANN001
    tokens = {tuple(t) for t in microbatches(1)[0, 0].view(-1, HIDDEN).tolist()}
    for found in ranks(4).run(first_codes, {"init": "data"}, layout=LAYOUTS["tp2ep2"]):
        assert {tuple(code) for code in found["codes"][0].tolist()} == tokens  # K = S * B


def broken_batches(settings: dict, which: str) -> dict:
    """In a rank: a step (or the very first microbatch) with a NaN on one rank only."""
    from vqmoe_megatron.moe import synchronize_codebooks

    layer = build_layer(VQConfig(**{**BASE, **settings}))
    steps = microbatches(3)
    steps[1 if which == "second step" else 0, 0, 0, 0, 0] = float("nan")
    states, ready = [], []
    for step in steps:
        for x in own_microbatches(step):
            output, _ = layer(x)
            ready.append(not layer.assigner.codebook.needs_data_init)
            output.sum().backward()
        synchronize_codebooks([layer])
        states.append(codebook_state(layer))
    return {"states": states, "ready": ready}


@pytest.mark.parametrize("update", ["ema", "reanchor", "gradient"])
def test_a_broken_step_on_one_rank_changes_no_codebook(ranks, update: str) -> None:  # noqa: ANN001
    for found in ranks(4).run(broken_batches, {"codebook_update": update}, "second step"):
        first, second, third = found["states"]
        for name in ("codebook.codes", "codebook.usage", "expert_of_row"):
            assert torch.equal(first[name], second[name]), name
        assert not torch.equal(second["codebook.usage"], third["codebook.usage"])
        assert all(torch.isfinite(third[name]).all() for name in third)


def test_a_broken_first_microbatch_initialises_nothing(ranks) -> None:  # noqa: ANN001
    for found in ranks(4).run(broken_batches, {"code_map": "clustered"}, "first microbatch"):
        assert found["ready"] == [False, True, True]
        assert torch.isfinite(found["states"][2]["codebook.codes"]).all()


def count_statistics(recompute: str, mode: str) -> dict:
    """In a rank: what one forward (and backward) leaves in the step's accumulators."""
    from megatron.core import tensor_parallel

    changes = {}
    if recompute == "moe":
        changes = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    layer = build_layer(VQConfig(**BASE), **changes)
    layer.train(mode != "eval")
    x = microbatches(1)[0, 0].requires_grad_()
    layer.assigner.codebook.initialize_from(x.detach().view(-1, HIDDEN))
    with torch.set_grad_enabled(mode != "no_grad"):
        if recompute == "whole layer":
            output = tensor_parallel.checkpoint(lambda h: layer(h)[0], False, x)
        else:
            output, _ = layer(x)
        if mode in ("train", "eval"):
            output.sum().backward()
    codebook = layer.assigner.codebook
    return {
        "tokens": codebook.step_count.sum(),
        "total": codebook.step_total.sum(dim=1),
        "load": layer.step_expert_load.sum(),
        "gate": layer.step_gate[1],
        "microbatches": layer.assigner.step_losses[2],
        "candidates": codebook.step_candidates is not None,
        "x": x.detach(),
    }


@pytest.mark.parametrize("recompute", ["none", "moe", "whole layer"])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "no backward"])
def test_statistics_are_recorded_once_per_trained_microbatch(
    ranks, recompute: str, mode: str
) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(count_statistics, recompute, mode)
    trained = float(mode == "train")
    assert float(found["tokens"]) == trained * SEQUENCE * BATCH
    assert float(found["load"]) == trained * 2 * SEQUENCE * BATCH
    assert float(found["gate"]) == trained * SEQUENCE * BATCH
    assert float(found["microbatches"]) == trained
    assert found["candidates"] is (mode == "train")
    expected = trained * found["x"].view(-1, HIDDEN).sum(dim=0)
    torch.testing.assert_close(found["total"][0], expected)


def finalized_gradients(settings: dict) -> dict:
    """In a rank: gradients after Megatron's DDP and CodebookSync, as an optimizer would see
    them."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )

    from vqmoe_megatron.moe import CodebookSync

    vq = VQConfig(**{**BASE, **settings})
    parameters = {n: p.float() for n, p in draw_parameters(vq).items()}
    layer = build_layer(vq, parameters)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = DistributedDataParallel(layer.config, ddp_config, layer)
    model.zero_grad_buffer()
    own = own_microbatches(microbatches(1)[0])
    for x in own:
        output, _ = model(x)
        # Megatron divides by microbatches; so must the VQ loss, which rides on the same scale.
        output.square().sum().backward()
    CodebookSync()([model])
    size = parallel_state.get_data_parallel_world_size()
    found = {n: p.main_grad * size for n, p in layer.named_parameters() if p.requires_grad}
    return {"gradients": found, "expert_place": expert_place()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_finalized_gradient_equals_that_of_one_rank(ranks, layout: str) -> None:  # noqa: ANN001
    """The codebook's among them. Data-parallel averages times DP are sums over microbatches."""
    settings = {"codebook_update": "gradient", "init": "uniform"}
    (alone,) = ranks(1).run(finalized_gradients, settings)
    together = ranks(4).run(finalized_gradients, settings, layout=LAYOUTS[layout])
    assert "assigner.codebook.codes" in alone["gradients"]
    cuts = {found["expert_place"]: found["gradients"] for found in together}
    for found in together:
        cuts[found["expert_place"]] = found["gradients"]  # each replica's in turn
        for name, expected in alone["gradients"].items():
            value = found["gradients"][name]
            if name.startswith("experts."):
                value = join_experts(name, {place: g[name] for place, g in cuts.items()})
            torch.testing.assert_close(
                value,
                expected,
                rtol=2e-5,
                atol=2e-5,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def made_by_the_reduction() -> tuple[int, int]:
    """In a rank: bytes of the statistics, and the most that reducing them makes at once."""
    from real_model import PeakBytes

    from vqmoe_megatron.moe.codebook_sync import reduce_statistics
    from vqmoe_megatron.moe.step_owner import step_owners

    layer = build_layer(VQConfig(**BASE))
    (step,) = microbatches(1)
    for microbatch in own_microbatches(step):
        layer(microbatch)[0].sum().backward()
    owners = step_owners([layer])
    parts = [part for owner in owners for part in owner.local_parts()]
    with PeakBytes() as made:
        reduce_statistics(owners, [layer])
    sums = [part for owner in owners for part in owner.sums.parts]
    is_in_place = [new.data_ptr() == old.data_ptr() for new, old in zip(sums, parts, strict=True)]
    assert all(is_in_place[:-1])  # of the first rank the candidates, too
    return sum(part.nbytes for part in parts), made.peak


def test_the_statistics_are_reduced_without_a_copy(ranks) -> None:  # noqa: ANN001
    first, second = ranks(2).run(made_by_the_reduction)
    assert first[1] == 0
    candidates = 12 * HIDDEN * 4  # of the rank that offers none, to receive the others'
    assert second[1] == candidates < second[0]


def of_several_groups() -> list[float]:
    """In a rank: two layers, one of whose replicas is this rank alone, and one in fp64."""
    from types import SimpleNamespace

    from vqmoe_megatron.moe.codebook_sync import reduce_statistics

    alone = [torch.distributed.new_group([rank]) for rank in range(2)]
    rank = torch.distributed.get_rank()
    owners = [
        SimpleNamespace(
            sums=None,
            num_recorded_microbatches=1,
            replica_group=group,
            gather=lambda: None,
            local_parts=lambda dtype=dtype: [torch.ones(2, dtype=dtype)],
        )
        for group, dtype in (
            (torch.distributed.group.WORLD, torch.float32),
            (alone[rank], torch.float32),
            (torch.distributed.group.WORLD, torch.float64),
        )
    ]
    reduce_statistics(owners, [])
    return [float(owner.sums.parts[0][0]) for owner in owners]


@pytest.mark.distributed
def test_every_owner_is_reduced_over_its_own_replicas_in_its_dtype(ranks) -> None:  # noqa: ANN001
    assert ranks(2).run(of_several_groups) == [[2.0, 1.0, 2.0]] * 2
