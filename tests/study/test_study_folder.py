"""The study's directory: indices that stay, the record for reports, the rule on started runs; and
its lock: one command starts runs, the others are told or wait."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from vqmoe_megatron.cli import study as commands
from vqmoe_megatron.config.recipe import save_recipe
from vqmoe_megatron.rundir.atomic import replace_file
from vqmoe_megatron.study import study_folder
from vqmoe_megatron.study.study import load_study, load_study_run
from vqmoe_megatron.study.study_folder import StudyFolder, is_study_locked, study_lock

HOLDER = """
import sys, time
from pathlib import Path
from vqmoe_megatron.study.study_folder import StudyFolder, study_lock
with study_lock(StudyFolder(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def pretend_started(study, *indices: int) -> None:
    """Write what a rank writes first, the vocabulary filled in."""
    for index in indices:
        config = study.runs[index].config
        model = replace(config.model, vocab_size=256)
        save_recipe(replace(config, model=model), study.runs[index].run_dir / "run_config.yaml")


def test_the_record_of_runs_is_what_reports_read(write_study) -> None:
    study = load_study(write_study(grid={"experts": [4], "router": {"vq": []}, "seed": [1, 2]}))
    study.start()
    rows = json.loads(study.folder.runs_file.read_text())
    assert rows[1] == {
        "index": 1,
        "name": "experts4-vq-seed2",
        "run_dir": str(study.folder.path / "runs" / "experts4-vq-seed2"),
        "point": {"experts": 4, "router": "vq", "seed": 2},
        "overrides": list(study.runs[1].overrides),
        "num_ranks": 1,
    }
    assert study.folder.logs.is_dir()


def test_the_copy_is_the_same_study(write_study) -> None:
    path = write_study()
    study = load_study(path)
    study.start()
    path.unlink()
    copy = load_study(study.folder.study_copy)
    assert copy.runs == study.runs
    copy.start()
    assert load_study(study.folder.study_copy).runs == study.runs


def test_a_run_keeps_its_index_when_the_grid_grows(write_study) -> None:
    before = load_study(write_study())
    before.start()
    grown = {"experts": [2, 4, 8], "router": before.file.content["grid"]["router"]}
    after = load_study(write_study(grid=grown))
    assert {i: run.name for i, run in after.runs.items()} == {
        **{i: run.name for i, run in before.runs.items()},
        4: "experts2-smoe",
        5: "experts2-vq",
    }
    assert load_study_run(after.file.path, 5).runs[5] == after.runs[5]


def test_an_index_that_left_the_grid_is_never_another_run(write_study) -> None:
    load_study(write_study(grid={"experts": [4, 8]})).start()
    load_study(write_study(grid={"experts": [4]})).start()
    path = write_study(grid={"experts": [4, 16]})
    study = load_study(path)
    study.start()
    assert {i: run.name for i, run in study.runs.items()} == {0: "experts4", 2: "experts16"}
    with pytest.raises(ValueError) as refused:
        load_study_run(path, 1)
    said = str(refused.value)
    assert "--index 1 was experts8, which is no longer in the grid" in said and "\n" not in said
    back = load_study(write_study(grid={"experts": [4, 8, 16]}))
    assert back.runs[1].name == "experts8"


def test_indices_of_an_older_record_are_kept(write_study) -> None:
    study = load_study(write_study(grid={"experts": [4, 8]}))
    study.start()
    study.folder.indices_file.unlink()  # written before there was one
    load_study(write_study(grid={"experts": [4]})).start()
    assert study.folder.recorded_indices() == {"experts4": 0, "experts8": 1}


def test_numbers_given_meanwhile_are_noticed(write_study) -> None:
    path = write_study(grid={"experts": [4, 8]})
    late = load_study(path)
    load_study(write_study("other.yaml", grid={"experts": [8]})).start()
    with pytest.raises(ValueError, match="numbered by another command"):
        late.start()


def test_the_directory_of_another_study_is_refused(write_study) -> None:
    first = load_study(write_study())
    first.start()
    copy = first.folder.study_copy.read_text()
    second = load_study(write_study("second.yaml", study={"name": "second"}))
    with pytest.raises(ValueError, match="holds the study 'tiny', not 'second'"):
        second.start()
    with pytest.raises(ValueError, match="holds the study 'tiny', not 'second'"):
        second.folder.create(second.file, list(second.runs.values()))
    assert first.folder.study_copy.read_text() == copy
    for damaged in ("[]", "", "study: {}\n", "#" * 2**18):
        first.folder.study_copy.write_text(damaged)
        with pytest.raises(ValueError, match="study.yaml is damaged"):
            first.start()


@pytest.mark.parametrize("name", ["study.yaml", "recipe.yaml"])
def test_files_that_no_study_wrote_are_not_replaced_by_its_copies(
    write_study, tmp_path, name
) -> None:
    study = load_study(write_study())
    study.folder.path.mkdir()
    mine = study.folder.path / name
    mine.write_text("# mine\n" + study.file.path.read_text())
    before = mine.read_text()
    with pytest.raises(ValueError, match=f"{name} is there already, and vqmoe study did not"):
        study.start()
    assert [path.name for path in study.folder.path.iterdir()] == [name]
    assert mine.read_text() == before


def test_a_study_file_in_its_own_output_dir_is_not_replaced_by_its_copy(write_study) -> None:
    path = write_study()
    inside = path.parent / "study" / "study.yaml"
    inside.parent.mkdir()
    inside.write_text("# mine\n" + path.read_text())
    with pytest.raises(ValueError, match="study.yaml is there already"):
        load_study(inside).start()
    assert inside.read_text().startswith("# mine")


def test_a_start_that_was_killed_between_its_files_is_taken_up(write_study, monkeypatch) -> None:
    study = load_study(write_study())
    for number in range(4):
        written = []

        def until(path, text, number=number, written=written):
            if len(written) == number:
                raise KeyboardInterrupt
            written.append(path)
            replace_file(path, text)

        monkeypatch.setattr(study_folder, "replace_file", until)
        with pytest.raises(KeyboardInterrupt):
            study.start()
        monkeypatch.undo()
    study.start()
    assert study.folder.runs_file.is_file()


def test_an_empty_output_dir_is_refused(write_study) -> None:
    for empty in ("", "  "):
        with pytest.raises(ValueError, match="study.output_dir is empty"):
            load_study(write_study(study={"output_dir": empty}))


def test_new_points_are_welcome_after_the_start(write_study) -> None:
    study = load_study(write_study())
    study.start()
    pretend_started(study, 0, 3)
    before = {run.name: index for index, run in study.runs.items()}
    grown = load_study(write_study(grid=study.file.content["grid"] | {"experts": [4, 8, 16]}))
    grown.start()
    after = {run.name: index for index, run in load_study(grown.file.path).runs.items()}
    assert before.items() < after.items()  # who was there kept its index
    assert {name for name in after if name not in before} == {
        "experts16-smoe",
        "experts16-vq",
    }


def test_a_change_of_a_started_run_is_refused_with_its_key(write_study) -> None:
    study = load_study(write_study())
    study.start()
    record = study.folder.runs_file.read_text()
    pretend_started(study, 0, 3)
    changed = load_study(write_study(more=["optimizer.lr=0.5"]))
    with pytest.raises(ValueError) as refused:
        changed.start()
    said = str(refused.value)
    assert "2 runs that have started differently" in said
    assert "experts4-smoe: optimizer.lr: was 0.001, is now 0.5" in said
    assert "experts8-vq" in said and "experts8-smoe" not in said
    assert study.folder.runs_file.read_text() == record


def test_where_a_run_reports_to_may_change(write_study) -> None:
    study = load_study(write_study())
    pretend_started(study, 0)
    more = ["tracking.mlflow=true", "tracking.experiment=other", "train.exit_interval=2"]
    load_study(write_study(more=more)).check_started()


def test_settings_of_a_memory_that_is_off_are_no_change_of_a_started_run(write_study) -> None:
    """A run of an older release stored other defaults of them."""
    study = load_study(write_study(more=["code_memory.codes=embedding", "code_memory.lr_mult=1.0"]))
    pretend_started(study, 0)
    load_study(write_study()).check_started()
    with pytest.raises(ValueError, match="code_memory.num_rows: was 0, is now 64"):
        load_study(write_study(more=["code_memory.num_rows=64"])).check_started()


def test_an_index_past_the_study_is_refused(write_study) -> None:
    with pytest.raises(ValueError, match="--index 4 is not in study .* 4 runs, indices 0 to 3"):
        load_study_run(write_study(), 4)


def test_runs_are_chosen_by_name_or_index(write_study) -> None:
    study = load_study(write_study())
    assert list(study.select(["experts4-vq", "3"])) == [1, 3]
    assert list(study.select([])) == list(range(4))
    with pytest.raises(ValueError, match="'experts4-qv'.*did you mean experts4-vq"):
        study.select(["experts4-qv"])
    with pytest.raises(ValueError, match="'4' is no run"):
        study.select(["4"])


def test_a_damaged_record_is_named(write_study) -> None:
    study = load_study(write_study())
    study.start()
    study.folder.runs_file.write_text("[{}]")
    with pytest.raises(ValueError, match="runs.json is damaged"):
        load_study(study.file.path)
    study.folder.runs_file.unlink()
    study.folder.indices_file.write_text("[1]")
    with pytest.raises(ValueError, match="indices.json is damaged"):
        load_study(study.file.path)


@contextmanager
def holder(folder: Path, seconds: float):
    """Another process that holds the lock; POSIX locks do not stop their own process."""
    command = [sys.executable, "-c", HOLDER, str(folder), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_lock_is_seen_and_ends_with_its_process(tmp_path) -> None:
    assert not is_study_locked(StudyFolder(tmp_path / "none")) and not (tmp_path / "none").exists()
    folder = StudyFolder(tmp_path / "s")
    with holder(folder.path, 600) as process:
        assert is_study_locked(folder)
        with pytest.raises(ValueError, match=f"being started by process {process.pid} on "):
            with study_lock(folder):
                pass
        process.kill()
        process.wait()
        assert not is_study_locked(folder)
        with study_lock(folder):
            pass


def test_a_second_study_run_is_refused_before_any_work(write_study, vqmoe) -> None:
    path = write_study(grid={"experts": [4]})
    study = load_study(path)
    with holder(study.folder.path, 600):
        code, shown = vqmoe("study", "run", path)
    assert code == 2 and len(shown.splitlines()) == 1 and "being started by process" in shown
    assert not study.folder.runs_file.exists() and not study.runs[0].run_dir.exists()


def test_a_submission_waits_for_no_one(write_study, vqmoe, monkeypatch, tmp_path) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho called > $0.log\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    path = write_study(grid={"experts": [4]})
    with holder(load_study(path).folder.path, 600):
        code, shown = vqmoe("study", "submit", path)
    assert code == 2 and "being started by process" in shown
    assert not (tmp_path / "sbatch.log").exists()


def test_a_watch_lasts_while_the_lock_is_held(write_study, vqmoe, monkeypatch) -> None:
    monkeypatch.setattr(commands, "WATCH_SECONDS", 0.1)
    path = write_study(grid={"experts": [4]})
    seconds = 1.5
    with holder(load_study(path).folder.path, seconds) as process:
        start = time.monotonic()
        code, _ = vqmoe("study", "status", path, "--watch")
        assert code == 0 and time.monotonic() - start > seconds / 2
        assert process.wait(30) == 0
