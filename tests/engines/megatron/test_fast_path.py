"""Whole runs with captured paths and tables ahead: the curves of runs without, and what is said.

The engine is given a recorder in the place of CUDA's graphs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import PARITY, TINY, layout_overrides, run_on, train_here

from vqmoe_megatron.engines.megatron.fast_path import FastPath
from vqmoe_megatron.runtime.recorded_graph import RecordedGraph

pytestmark = pytest.mark.distributed

FEW = [*TINY, "train.train_iters=20", "train.exit_interval=4", "train.micro_batch_size=2"]
EP2 = {"expert_model_parallel_size": 2}
SUMMED_OTHERWISE = 2e-5  # a table's rows meet their experts apart from the travelling ones


def train_recorded(recipe: str, overrides: list[str]) -> dict:
    """In a rank: as :func:`train_here`, captured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FastPath, "of", lambda *_: FastPath(RecordedGraph, ()))
        return train_here(recipe, overrides)


def rows_started(recipe: str, overrides: list[str]) -> int:
    """In a rank: how often rows of a code memory travelled ahead while training."""
    from vqmoe_megatron.moe.memory.path import MemoryPath

    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryPath, "start", lambda path: calls.append(path))
        assert not train_here(recipe, overrides)["error"]
    return len(calls)


def test_rows_wait_for_weights_that_hooks_bring(ranks, small_corpus, tmp_path) -> None:
    """A second stream would take the wait for them away from the first."""
    every = [*FEW, *layout_overrides(EP2), f"data.path={small_corpus}", "vq.path=continuous"]
    every += ["code_memory.num_rows=64", "optimizer.use_distributed_optimizer=true"]
    gathered = ["optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"]
    for number, (overrides, is_started) in enumerate((([], True), (gathered, False))):
        where = [f"train.output_dir={tmp_path / str(number)}"]
        counts = ranks(2).run(rows_started, str(PARITY), [*every, *overrides, *where], layout=EP2)
        assert [count > 0 for count in counts] == [is_started] * 2


def losses(results: list[dict]) -> list[float]:
    assert not any(result["error"] for result in results), results[0]["error"]
    return [r[name] for r in results[0]["records"] for name in ("loss", "grad_norm") if name in r]


@pytest.mark.parametrize(
    ("layout", "overrides"),
    [({}, []), (EP2, ["vq.straight_through=none", "optimizer.use_distributed_optimizer=true"])],
    ids=["1rank", "ep2"],
)
def test_a_captured_run_has_the_curve_of_the_run(
    ranks,  # noqa: ANN001
    small_corpus: Path,
    tmp_path: Path,
    layout: dict[str, int],
    overrides: list[str],
) -> None:
    pool = ranks(2 if layout else 1)
    every = [*FEW, *overrides, f"data.path={small_corpus}", "train.log_interval=1"]
    every += layout_overrides(layout)
    plain, captured = (
        pool.run(
            job, str(PARITY), [*every, f"train.output_dir={tmp_path / job.__name__}"], layout=layout
        )
        for job in (train_here, train_recorded)
    )
    assert losses(captured) == pytest.approx(losses(plain), rel=SUMMED_OTHERWISE)
    assert len(losses(plain)) >= 8


def test_tables_ahead_have_the_curve_of_tables_in_turn_and_a_cpu_is_told(
    ranks,  # noqa: ANN001
    small_corpus: Path,
    tmp_path: Path,
) -> None:
    pool, few = ranks(2), [*FEW, "train.log_interval=1"]
    plain = run_on(pool, small_corpus, tmp_path / "plain", few, EP2)
    ahead = run_on(pool, small_corpus, tmp_path / "ahead", [*few, "vq.overlap_table=true"], EP2)
    assert losses(ahead) == pytest.approx(losses(plain), rel=SUMMED_OTHERWISE)
    assert any(
        "vq.overlap_table overlaps nothing here: there is one stream" in m
        for m in ahead[0]["messages"]
    )


def test_graphs_that_cannot_be_are_off_with_their_reasons(
    ranks,  # noqa: ANN001
    small_corpus: Path,
    tmp_path: Path,
) -> None:
    asked = [*FEW, "train.cuda_graphs=true"]
    messages = run_on(ranks(2), small_corpus, tmp_path / "run", asked, EP2)[0]["messages"]
    told = [message for message in messages if message.startswith("train.cuda_graphs is off: ")]
    assert len(told) == 3
    assert "model.bf16=false" in told[0] and "no CUDA device" in told[2]
    assert "straight_through=token with EP * ETP = 2" in told[1]
