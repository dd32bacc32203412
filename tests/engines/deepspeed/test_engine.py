"""DeepSpeed trains the model that Megatron trains, at every layout it is offered for."""

from __future__ import annotations

import math

import pytest
from fast_tier import only
from gloo_ranks import RankPool
from small_run import PARITY, TINY, run_on
from troubled_run import train_with_one_poisoned_step
from unregistered_experts import train_without_registration

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]  # its first start compiles

EP = "expert_model_parallel_size"
SIX = ["train.train_iters=20", "train.exit_interval=6", "train.global_batch_size=8"]
DEEPSPEED = "train.engine=deepspeed"
MEMORY = ["vq.path=continuous", "code_memory.num_rows=64"]
FROZEN = ["vq.codebook_update=gradient", "vq.freeze_after_steps=3"]
GLOBAL_BALANCE = "model.moe_router_load_balancing_type=global_aux_loss"
LAYOUTS = {"dp2": (2, {}), "ep2": (2, {EP: 2}), "dp2-ep2": (4, {EP: 2})}


def zero(stage: int) -> list[str]:
    return [DEEPSPEED, f"train.zero_stage={stage}"]


CASES = {
    f"{layout}-zero{stage}": (*LAYOUTS[layout], zero(stage))
    for layout in LAYOUTS
    for stage in (0, 1, 2)
    if (layout, stage) not in (("ep2", 0), ("ep2", 2), ("dp2-ep2", 2))  # below, with more beside
} | {
    "ep2-zero1-offload": (2, {EP: 2}, [*zero(1), "train.offload_optimizer=true"]),
    "ep2-zero2-trained-codes": (2, {EP: 2}, [*zero(2), "vq.codebook_update=gradient"]),
    "dp2-ep2-zero2-memory": (4, {EP: 2}, [*zero(2), *MEMORY]),
    "ep2-zero0-memory": (2, {EP: 2}, [*zero(0), *MEMORY]),
    "ep2-zero2-frozen-codes": (2, {EP: 2}, [*zero(2), *FROZEN]),
    "one-zero1-global-balance": (1, {}, [*zero(1), GLOBAL_BALANCE]),  # differs by ranks as it is
}
FAST = (
    "ep2-zero1",
    "dp2-ep2-zero2-memory",
    "ep2-zero2-frozen-codes",
    "one-zero1-global-balance",
)
OF_THE_MODEL = (*MEMORY, *FROZEN, GLOBAL_BALANCE)


@pytest.fixture
def new_ranks():
    """A world of its own for every run: DeepSpeed keeps its groups as long as a process lives, and
    a pool that others use makes them anew at every change of the layout."""
    pools = []

    def start(world_size):
        pools.append(RankPool(world_size))
        return pools[-1]

    yield start
    for pool in pools:
        pool.close()


@pytest.fixture(scope="module")
def native(ranks, stdlib_corpus, tmp_path_factory):
    """Records of one rank of Megatron's, by what the model is told."""
    known = {}

    def records(overrides):
        key = tuple(one for one in overrides if one in OF_THE_MODEL)
        if key not in known:
            where = tmp_path_factory.mktemp("native")
            known[key] = run_on(ranks(1), stdlib_corpus, where, [*SIX, *key], {})[0]["records"]
        return known[key]

    return records


@pytest.mark.parametrize("name", only(CASES, *FAST))
def test_the_curve_is_megatrons(name, new_ranks, native, stdlib_corpus, tmp_path):
    num_ranks, layout, overrides = CASES[name]
    results = run_on(new_ranks(num_ranks), stdlib_corpus, tmp_path, [*SIX, *overrides], layout)
    for result in results:
        for ours, theirs in zip(result["records"], native(overrides), strict=True):
            compared = {"loss", "grad_norm", "val/loss"} & set(theirs)
            assert compared
            for metric in compared:
                assert ours[metric] == pytest.approx(theirs[metric], rel=5e-6), metric
            assert ours.get("vq/dead_codes") == theirs.get("vq/dead_codes")
            assert ours["learning_rate"] == theirs["learning_rate"] if "loss" in compared else True
    assert len({str(result["codebooks"]) for result in results}) == 1
    assert len({str(result["streams"]) for result in results}) == 1


def test_without_the_registration_of_experts_it_is_another_model(
    new_ranks, native, stdlib_corpus, tmp_path
):
    every = [*SIX, *zero(1), f"data.path={stdlib_corpus}", f"parallel.{EP}=2"]
    every += [f"train.output_dir={tmp_path}"]
    results = new_ranks(2).run(train_without_registration, str(PARITY), every, layout={EP: 2})
    ours, theirs = (x[-1]["loss"] for x in (results[0]["records"], native([])))
    assert abs(ours - theirs) > 1e-3


JOURNEYS = {
    "native-zero1-native": [(2, {EP: 2}, []), (2, {}, zero(1)), (1, {}, [])],
    "zero2-native-zero0": [
        (4, {EP: 2}, zero(2)),
        (2, {EP: 2}, ["optimizer.use_distributed_optimizer=true"]),
        (2, {EP: 2}, zero(0)),
        (2, {EP: 2}, zero(2)),
    ],
}


@pytest.mark.parametrize("name", only(JOURNEYS, "zero2-native-zero0"))
def test_a_run_goes_on_with_either_engine(name, new_ranks, stdlib_corpus, tmp_path):
    every = ["train.train_iters=20", "train.eval_iters=0"]
    moved = {}
    for number, (num_ranks, layout, overrides) in enumerate(JOURNEYS[name]):
        here = [*every, "train.exit_interval=2", *overrides]
        results = run_on(new_ranks(num_ranks), stdlib_corpus, tmp_path / "moved", here, layout)
        assert results[0]["iteration"] == 2 * number + 2
        moved |= {r["iteration"]: r for r in results[0]["records"]}
    here = [*every, f"train.exit_interval={len(moved)}"]
    stayed = run_on(new_ranks(1), stdlib_corpus, tmp_path / "stayed", here, {})[0]["records"]
    for record in stayed:
        for metric in ("loss", "grad_norm"):
            ours = moved[record["iteration"]][metric]
            assert ours == pytest.approx(record[metric], rel=1e-5), (record["iteration"], metric)


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_is_near_megatrons_and_resumes_bitwise(stage, new_ranks, small_corpus, tmp_path):
    every = [*TINY, "train.train_iters=6", "model.bf16=true"]
    layout = {EP: 2}
    native = run_on(new_ranks(2), small_corpus, tmp_path / "native", every, layout)[0]["records"]
    stayed = run_on(new_ranks(2), small_corpus, tmp_path / "s", [*every, *zero(stage)], layout)
    cut = [*every, *zero(stage), "train.exit_interval=3"]
    for _ in range(2):
        moved = run_on(new_ranks(2), small_corpus, tmp_path / "moved", cut, layout)
    losses = [{r["iteration"]: r["loss"] for r in x} for x in (native, stayed[0]["records"])]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    for record in moved[0]["records"]:
        assert record["loss"] == losses[1][record["iteration"]]
    assert moved[0]["codebooks"] == stayed[0]["codebooks"] == stayed[1]["codebooks"]


@pytest.mark.parametrize("stage", [0, 2])
def test_a_poisoned_step_is_dropped_on_all_ranks(stage, new_ranks, small_corpus, tmp_path):
    every = [*TINY, "train.train_iters=6", "train.nan_policy=skip", f"data.path={small_corpus}"]
    every += [f"train.output_dir={tmp_path}", f"parallel.{EP}=2", *zero(stage)]
    results = new_ranks(2).run(train_with_one_poisoned_step, str(PARITY), every, layout={EP: 2})
    for result in results:
        assert (result["skipped"], result["iteration"], result["error"]) == (1, 6, "")
        losses = {record["iteration"]: record["loss"] for record in result["records"]}
        assert [number for number, loss in losses.items() if not math.isfinite(loss)] == [3]
        assert result["finite_codebooks"]
    assert results[0]["codebooks"] == results[1]["codebooks"]
