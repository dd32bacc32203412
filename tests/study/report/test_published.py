"""A published page says what the records beside it say, and its study can go on from them."""

import csv
import io
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

from vqmoe_megatron.study.report.run_table import csv_text, read_study
from vqmoe_megatron.study.run_state import run_state
from vqmoe_megatron.study.study import load_study

ROOT = Path(__file__).parents[3]
STUDIES = ROOT / "docs" / "studies"
ARCHIVES = sorted(STUDIES.glob("*/records.tar.gz"))
MEASURED = ("name", "state", "iteration", "num_tokens", "final_val_loss", "final_bits_per_byte")


def unpacked(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (study,) = (folder / "runs").iterdir()
    return study


def measured(text: str) -> list[dict[str, str]]:
    return [{name: row[name] for name in MEASURED} for row in csv.DictReader(io.StringIO(text))]


def test_there_is_a_published_study():
    assert ARCHIVES


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda archive: archive.parent.name)
def test_the_published_table_is_that_of_its_records(archive, tmp_path):
    study = read_study(unpacked(archive, tmp_path), "CPU")
    published = (archive.parent / "runs.csv").read_text()
    assert measured(csv_text(study)) == measured(published)


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda archive: archive.parent.name)
def test_the_study_goes_on_from_its_records(archive, tmp_path, monkeypatch):
    published = csv.DictReader(io.StringIO((archive.parent / "runs.csv").read_text()))
    finished = {row["name"] for row in published if row["state"] == "finished"}
    monkeypatch.chdir(tmp_path)
    study = load_study(unpacked(archive, Path()) / "study.yaml")
    study.check_started()  # what started is what the file would start
    assert {run.name for run in study.runs.values() if run_state(run).is_finished} == finished


def test_the_documented_command_packs_the_records_and_nothing_else(tmp_path):
    study = unpacked(STUDIES / "control_arms" / "records.tar.gz", tmp_path)
    wanted = sorted(file for file in study.rglob("*") if file.is_file())
    for name in ("checkpoints/iter_1/shard", "plots/loss.png", ".lock", "mlflow.json"):
        other = study / "runs" / "default-seed1" / name
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text("not a record")
    (tmp_path / "docs" / "studies" / "control_arms").mkdir(parents=True)
    text = (ROOT / "docs" / "operations.md").read_text()
    command = re.search(r"^tar -czf (?:.*\\\n)*.*$", text, re.MULTILINE)[0]
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    with tarfile.open(tmp_path / "docs" / "studies" / "control_arms" / "records.tar.gz") as tar:
        packed = sorted(tmp_path / member.name for member in tar if member.isfile())
    assert packed == wanted
