"""A user's package in a real run: its tracker is told, its metric shown, its faults cost nothing.

Nothing of ours is changed for it: a tracker and a metric are one class or object and one line.
"""

from __future__ import annotations

import json
import math

import pytest
from small_run import PARITY, TINY, start_vqmoe
from toy_package import PARTS, install, pretend_installed

from vqmoe_megatron import registry
from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.rundir.status import read_status
from vqmoe_megatron.track.metrics_log import read_metrics
from vqmoe_megatron.train.preflight import check_run


@pytest.fixture(autouse=True)
def forget_installed():
    yield
    registry._installed.cache_clear()


@pytest.mark.distributed
def test_five_steps_with_a_packages_tracker_and_metric(small_corpus, tmp_path, monkeypatch):
    install(monkeypatch, tmp_path)
    run_dir, log = tmp_path / "run", tmp_path / "log.txt"
    process = start_vqmoe(
        *("pretrain", str(PARITY), "--nproc", "2", *TINY),
        *(f"data.path={small_corpus}", f"train.output_dir={run_dir}"),
        *(
            "train.train_iters=5",
            "optimizer.lr_warmup_iters=1",
            "parallel.expert_model_parallel_size=2",
        ),
        *("vq.quantizer=measured", "tracking.also=[broken,toy]", "train.eval_iters=1"),
        log=log,
    )
    assert process.wait(120) == 0, log.read_text()
    calls = [json.loads(line) for line in (run_dir / "toy.jsonl").read_text().splitlines()]
    told = {name: [args for call, *args in calls if call == name] for name, *_ in calls}

    assert calls[0] == ["open", 0, 2] and told["finish"][0][0] == "completed"
    ((params,),) = told["log_params"]
    assert params["tracking.also"] == "broken,toy" and params["train.train_iters"] == 5
    records = read_metrics(run_dir)
    assert [record["iteration"] for record in records] == [0, 1, 2, 3, 4, 5]
    of_run = [record for (record,) in told["metrics_logged"] if "consumed_tokens" in record]
    assert of_run == records
    files = [path for path, _ in told["log_artifact"]]
    assert str(run_dir / "run_config.yaml") in files and str(run_dir / "plots/loss.png") in files
    ((folder, iteration),) = told["checkpoint_saved"]
    assert (folder, iteration) == (str(run_dir / "checkpoints" / "iter_0000005"), 5)

    for record in records[1:]:
        layers = [record[f"toy/layer_{number:02d}/usage_gini"] for number in (1, 2)]
        assert all(0 < gini < 1 for gini in layers)
        assert math.isclose(record["toy/usage_gini"], sum(layers) / 2)
    shown = log.read_text()
    assert shown.count("usage_gini 0.") == 5
    assert shown.count("tracker broken") == 1
    assert read_status(run_dir).state == "completed" and read_status(run_dir).mlflow_run_id is None


@pytest.mark.parametrize(
    ("point", "says"),
    [
        ({"tracker.toy": "toy_package:Gone"}, "entry point tracker.toy = toy_package:Gone"),
        ({"tracker.toy": PARTS["tracker.toy"], "metric.x": "toy_package:TAKEN"}, "the name loss"),
    ],
)
def test_a_part_that_cannot_be_used_is_refused_first(
    small_corpus, tmp_path, monkeypatch, point, says
):
    pretend_installed(monkeypatch, point)
    overrides = [*TINY, f"data.path={small_corpus}", f"train.output_dir={tmp_path / 'run'}"]
    config = load_recipe(PARITY, [*overrides, "tracking.also=[toy]"])
    with pytest.raises(ValueError, match=says):
        check_run(config, 1, "cpu")
    assert not (tmp_path / "run").exists()
