"""Fused kernels in Megatron's model and optimizer: the same curve, by the kernel that was chosen.

Apex cannot exist here, so its packages are stand-ins in plain torch (stand_ins.py), each in a
process of its own. They prove the wiring, not NVIDIA's kernels.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_run import PARITY, TINY
from stand_ins import APEX, run_beside, start_beside, write

from vqmoe_megatron.track.metrics_log import read_metrics

TRAIN = """
from vqmoe_megatron.runtime.third_party_noise import quiet_known_messages
from vqmoe_megatron.runtime.cpu_compat import install_cpu_compat
quiet_known_messages()
install_cpu_compat()
import torch
from megatron.core import parallel_state, tensor_parallel
torch.distributed.init_process_group(
    "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
from real_model import recipe, task_of, _batches
from vqmoe_megatron.engines.megatron.engine import MegatronEngine
from vqmoe_megatron.plan.layout import check_layout
from vqmoe_megatron.runtime.fused_parts import FusedParts
parts, overrides = given
config = recipe(overrides)
engine = MegatronEngine.build(
    config, check_layout(config, 1, "cpu"), task_of(config), parts=FusedParts(**parts))
for chunk in engine.model:
    chunk.train()
torch.manual_seed(5)
batches = _batches(config)
steps = [engine.step([batches], 0, False) for _ in range(4)]
inner = [part.optimizer for part in engine.optimizer.chained_optimizers]
found = {
    "curve": [[step.loss, step.grad_norm] for step in steps],
    "adam": sorted({type(adam).__module__ for adam in inner}),
    "experts": float(sum(p.double().square().sum() for n, p in engine.model[0].named_parameters()
                         if ".experts." in n)),
    "calls": {},
}
for module, name in (("apex.optimizers", "FusedAdam.num_steps"),
                     ("apex.normalization.fused_layer_norm",
                      "FusedLayerNormAffineFunction.num_calls"),
                     ("fused_weight_gradient_mlp_cuda", "num_calls")):
    if module in sys.modules:
        thing = sys.modules[module]
        for step in name.split("."):
            thing = getattr(thing, step)
        found["calls"][module.split(".")[-1]] = thing
"""
PLAIN_RUNS: dict[tuple, dict] = {}
ALL_FUSED = {"apex_norm": True, "gradient_accumulation_fusion": True, "fused_adam": True}
COUNTER = {
    "apex_norm": "fused_layer_norm",
    "gradient_accumulation_fusion": "fused_weight_gradient_mlp_cuda",
    "fused_adam": "optimizers",
}


def plain(overrides: list[str]) -> dict:
    """The same steps without any stand-in."""
    key = tuple(overrides)
    if key not in PLAIN_RUNS:
        PLAIN_RUNS[key] = run_beside(None, TRAIN, {}, overrides)
        assert PLAIN_RUNS[key]["calls"] == {}
        assert PLAIN_RUNS[key]["adam"] == ["torch.optim.adamw"]
    return PLAIN_RUNS[key]


@pytest.mark.parametrize(
    ("parts", "overrides"),
    [
        ({"apex_norm": True}, []),
        ({"gradient_accumulation_fusion": True}, []),
        ({"fused_adam": True}, []),
        (ALL_FUSED, ["optimizer.use_distributed_optimizer=true", "model.bf16=true"]),
    ],
    ids=["norm", "gradient-accumulation", "adam", "all-bf16-distributed"],
)
def test_a_part_does_its_work_and_the_curve_stays(parts, overrides, tmp_path: Path) -> None:
    fused = run_beside(write(tmp_path, APEX), TRAIN, parts, overrides)
    for field, module in COUNTER.items():
        calls = fused["calls"].get(module, 0)
        assert bool(calls) == parts.get(field, False), (module, calls)
    expected_adam = "apex.optimizers" if parts.get("fused_adam") else "torch.optim.adamw"
    assert fused["adam"] == [expected_adam]
    tolerance = 1e-2 if "model.bf16=true" in overrides else 2e-5
    expected = plain(overrides)
    torch.testing.assert_close(
        torch.tensor(fused["curve"]), torch.tensor(expected["curve"]), rtol=tolerance, atol=0.0
    )
    assert fused["experts"] == pytest.approx(expected["experts"], rel=tolerance)


def test_beside_apex_nothing_of_it_is_used_where_nothing_is_chosen(tmp_path: Path) -> None:
    """Megatron has already built Apex's Adam; torch's stands in its place, bit by bit."""
    for overrides in ([], ["optimizer.use_distributed_optimizer=true", "model.bf16=true"]):
        beside = run_beside(write(tmp_path, APEX), TRAIN, {}, overrides)
        assert set(beside["calls"].values()) <= {0}
        expected = plain(overrides)
        assert (beside["curve"], beside["experts"]) == (expected["curve"], expected["experts"])
        assert beside["adam"] == expected["adam"]


def command(folder: Path | None, run_dir: Path, corpus: Path, *overrides: str) -> list[float]:
    done = start_beside(
        folder,
        *("-m", "vqmoe_megatron.cli", "pretrain", str(PARITY), *TINY, "train.log_interval=1"),
        *("tracking.mlflow=false", f"data.path={corpus}", f"train.output_dir={run_dir}"),
        *overrides,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Adam is torch's" not in done.stdout  # of CUDA only
    return [record["loss"] for record in read_metrics(run_dir) if record["iteration"]]


@pytest.mark.full
def test_a_run_on_the_cpu_is_the_same_beside_anything(small_corpus, tmp_path: Path) -> None:
    """An empty folder, and a whole stand-in, through the command, a stop and a resume."""
    every = ("train.train_iters=6", "optimizer.use_distributed_optimizer=true")
    alone = command(None, tmp_path / "alone", small_corpus, *every)
    (tmp_path / "empty" / "apex").mkdir(parents=True)
    assert command(tmp_path / "empty", tmp_path / "beside_empty", small_corpus, *every) == alone
    apex = write(tmp_path / "whole", APEX)
    stopped = (*every, "train.exit_interval=3")
    assert command(apex, tmp_path / "beside", small_corpus, *stopped) == alone[:3]
    assert command(apex, tmp_path / "beside", small_corpus, *every) == alone


def test_what_is_asked_for_in_vain_is_refused_before_anything_is_written(
    small_corpus, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for switch in ("optimizer.fused_adam=true", "model.fp8=hybrid"):
        done = start_beside(
            None,
            *("-m", "vqmoe_megatron.cli", "pretrain", str(PARITY), "vq.execution=tokens"),
            *(f"data.path={small_corpus}", f"train.output_dir={run_dir}", switch),
            *("model.hidden_size=32", "model.moe_ffn_hidden_size=64"),
        )
        assert done.returncode == 2, done.stderr
        assert f"{switch} cannot be had here (device=cpu)" in done.stderr
        assert not run_dir.exists()
