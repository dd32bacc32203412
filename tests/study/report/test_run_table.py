"""The table of runs: the figures of metrics.jsonl, and every run in it whatever its state."""

import csv
import io
import json
import shutil
import statistics
from pathlib import Path

import pytest
from written_study import NUM_STEPS, write_study

from vqmoe_megatron.study.report.run_table import ReportedStudy, csv_text, read_study
from vqmoe_megatron.track.metrics_log import read_metrics

STATES = {
    "experts4-vq-ranks1-seed2": ("pending", 0),
    "experts8-vq-ranks1-seed1": ("failed", 9),
    "experts8-vq-ranks1-seed2": ("running", 17),  # nobody holds the directory
    "experts8-smoe-ranks1-seed1": ("requeue", 20),
    "experts8-smoe-ranks1-seed2": ("completed", 30),  # by exit_interval
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return write_study(tmp_path_factory.mktemp("table") / "s", sizes=(4, 8), states=STATES)


@pytest.fixture(scope="module")
def study(directory) -> ReportedStudy:
    return read_study(directory, "CPU")


@pytest.fixture(scope="module")
def cells(study) -> dict[str, dict[str, str]]:
    lines = csv.DictReader(io.StringIO(csv_text(study)))
    return {line["name"]: line for line in lines}


def test_the_csv_repeats_metrics_jsonl_exactly(directory, cells):
    for name, line in cells.items():
        if STATES.get(name, ("", 0))[0] == "pending":
            continue
        records = read_metrics(directory / "runs" / name)
        losses = [record["val/loss"] for record in records if "val/loss" in record]
        speeds = [r["tokens_per_second"] for r in records if "tokens_per_second" in r]
        imbalance = [r["moe/expert_load_imbalance"] for r in records[1:]]
        assert float(line["final_val_loss"]) == losses[-1]
        assert float(line["best_val_loss"]) == min(losses)
        bits = [record["val/bits_per_byte"] for record in records if "val/loss" in record]
        assert float(line["final_bits_per_byte"]) == bits[-1]
        assert int(line["num_tokens"]) == records[-1]["consumed_tokens"]
        num_left_out = -(-len(speeds) // 10)
        assert float(line["tokens_per_second"]) == statistics.median(speeds[num_left_out:])
        num_late = -(-len(imbalance) // 4)
        late = statistics.fmean(imbalance[-num_late:])
        assert float(line["expert_load_imbalance"]) == pytest.approx(late, rel=1e-12)
        assert bool(line["code_perplexity"]) == ("-vq-" in name)


def test_every_run_is_a_line_with_its_state(cells):
    found = {name: (line["state"], line["iteration"]) for name, line in cells.items()}
    assert len(found) == 8
    assert found["experts4-vq-ranks1-seed1"] == ("finished", f"{NUM_STEPS}")
    assert found["experts4-vq-ranks1-seed2"] == ("waiting", "0")
    assert found["experts8-vq-ranks1-seed1"] == ("failed", "9")
    assert found["experts8-vq-ranks1-seed2"] == ("lost", "17")
    assert found["experts8-smoe-ranks1-seed1"] == ("stopped", "20")
    assert found["experts8-smoe-ranks1-seed2"] == ("stopped", "30")


def test_a_run_that_has_not_started_is_planned_from_its_overrides(cells):
    waiting, done = (cells[f"experts4-vq-ranks1-seed{seed}"] for seed in (2, 1))
    assert waiting["num_parameters_total"] == done["num_parameters_total"] != ""
    assert waiting["final_val_loss"] == "" and waiting["num_flops"] == ""


def test_operations_are_tokens_times_the_plan(study):
    for row in study.rows:
        if row.num_tokens:
            assert row.num_flops == row.num_tokens * row.planned.flops_per_token > 0
        assert 0 < row.planned.num_parameters_active < row.planned.num_parameters_total


def test_a_moved_study_is_read_where_it_is(tmp_path):
    there = write_study(tmp_path / "old", sizes=(4,), seeds=(1,))
    there.rename(tmp_path / "new")
    study = read_study(tmp_path / "new", "CPU")
    assert len(study.finished) == 2 and all(row.final_val_loss for row in study.rows)


def test_a_copied_study_is_planned_from_its_own_recipe(tmp_path):
    states = {"experts4-vq-ranks1-seed1": ("pending", 0)}
    old = write_study(tmp_path / "old", sizes=(4,), seeds=(1,), routers=("vq",), states=states)
    new = tmp_path / "new"
    shutil.copytree(old, new)
    (old / "recipe.yaml").write_text("model: {num_layers: 7}\n")  # the old place lives on
    assert read_study(new, "CPU").rows[0].config.model.num_layers == 2
    shutil.rmtree(old)
    assert read_study(new, "CPU").rows[0].config.model.num_layers == 2


def test_a_study_is_also_named_by_its_file(tmp_path):
    there = write_study(tmp_path / "s", sizes=(4,), seeds=(1,))
    study = read_study(there / "study.yaml", "CPU")
    assert (study.path, study.name, study.rule) == (there, "written", "equal_tokens")


def test_a_damaged_run_is_listed_with_its_reason(tmp_path):
    there = write_study(tmp_path / "s", sizes=(4,), routers=("vq",))
    log = there / "runs" / "experts4-vq-ranks1-seed1" / "metrics.jsonl"
    log.write_text("{broken\n" + log.read_text())
    damaged, whole = read_study(there, "CPU").rows
    assert damaged.state == "unreadable" and "line 1 is not a metrics record" in damaged.reason
    assert whole.state == "finished"


def test_a_run_without_recipe_and_directory_says_so(tmp_path):
    states = {"experts4-vq-ranks1-seed1": ("pending", 0)}
    there = write_study(tmp_path / "s", sizes=(4,), routers=("vq",), states=states)
    (there / "recipe.yaml").unlink()
    row = read_study(there, "CPU").rows[0]
    assert row.state == "waiting" and "recipe is not there" in row.reason


def test_what_is_no_study_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such path"):
        read_study(tmp_path / "nowhere", "CPU")
    with pytest.raises(ValueError, match="has no runs yet"):
        read_study(tmp_path, "CPU")
    file = tmp_path / "study.yaml"
    file.write_text(f"study: {{name: s, output_dir: {tmp_path}/none}}\n")
    with pytest.raises(ValueError, match="has no runs yet"):
        read_study(file, "CPU")
    for value, found in (("5", "must be a path, not 5"), ("[a]", "must be"), ("''", "must be")):
        file.write_text(f"study: {{name: s, output_dir: {value}}}\n")
        with pytest.raises(ValueError, match=f"study.output_dir {found}"):
            read_study(file, "CPU")
    file.write_text("model: {}\n")
    with pytest.raises(ValueError, match="no section `study:`"):
        read_study(file, "CPU")
    (tmp_path / "endless.yaml").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="cannot be read as a study: it is longer"):
        read_study(tmp_path / "endless.yaml", "CPU")
    for content, message in (
        ("[]", "lists no runs"),
        ("{", "is not a list"),
        ('[{"a":1}]', "name"),
    ):
        (tmp_path / "runs.json").write_text(content)
        file.write_text(f"study: {{name: s, output_dir: {json.dumps(str(tmp_path))}}}\n")
        with pytest.raises(ValueError, match=message):
            read_study(file, "CPU")
