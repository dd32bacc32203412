"""A whole report: self-contained, complete, rewritten in place, and logged to the parent run."""

import csv
import json
import re

import pytest
from mlflow import MlflowClient
from test_page import Reader
from typer.testing import CliRunner
from written_study import write_study as written_study

from vqmoe_megatron import cli
from vqmoe_megatron.rundir.own_outputs import RECORD_FILE, replace_recorded
from vqmoe_megatron.rundir.status import write_status
from vqmoe_megatron.study.report import write
from vqmoe_megatron.study.report.content import PLOT_NAMES
from vqmoe_megatron.study.report.write import log_to_parent, write_report
from vqmoe_megatron.track.metrics_log import read_metrics
from vqmoe_megatron.track.mlflow.parent_run import open_parent_run

STATES = {
    "experts32-vq-ranks1-seed2": ("pending", 0),
    "experts16-vq-ranks1-seed1": ("failed", 9),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report") / "study"
    written_study(directory, sizes=(4, 8, 16, 32), states=STATES)
    return write_report(directory, hardware="cpu")


def test_every_file_is_there_and_nothing_half_written(written):
    names = {file.name for file in written.folder.iterdir()}
    assert names == {*PLOT_NAMES, "runs.csv", "report.md", "index.html", RECORD_FILE}


def test_the_page_needs_nothing_but_itself(written):
    reader = Reader(written.page.read_text())
    assert reader.open == []
    assert {tag for tag, _ in reader.tags}.isdisjoint({"script", "link", "iframe", "object"})
    links = [a[name] for _, a in reader.tags for name in ("src", "href", "srcset") if name in a]
    assert len(links) == len(PLOT_NAMES)
    assert all(link.startswith("data:image/png;base64,iVBOR") for link in links)
    assert "http:" not in written.page.read_text() and "https:" not in written.page.read_text()
    assert not re.search(r"url\(|@import", written.page.read_text())


def test_the_page_says_what_it_is_about(written):
    text = Reader(written.page.read_text()).text
    assert "equal tokens: every run reads" in text and "14 finished, 2 not" in text
    assert "n = 1 to 2" in text and text.count("Not measured:") == len(PLOT_NAMES)
    assert re.search(r"By commit([0-9a-f]{12}|unknown)", text) and "GiB, GPU:" in text


def test_unfinished_runs_are_shown_and_not_counted(written):
    text, report = written.page.read_text(), (written.folder / "report.md").read_text()
    for name, (state, iteration) in STATES.items():
        shown = "waiting" if state == "pending" else state
        assert f"| {name} | {shown} | {iteration} | 40 |" in report
        assert text.count(f"<td>{name}</td>") == 2  # among the unfinished, and among all runs
        assert f": {name} {shown} (" in text  # and its pair is left out
    assert "1 failed, 1 waiting: these enter no mean" in report
    assert re.search(r"\| vq \| 16 \| 1 \|", report) and re.search(r"\| vq \| 8 \| 2 \|", report)


def test_the_fit_stands_in_the_table_with_its_intervals(written):
    report = (written.folder / "report.md").read_text()
    number = r"-?\d[\d.e+-]*"
    fitted = rf"{number} \[{number}, {number}\]"
    assert re.search(
        rf"\| smoe \| power law \| L_inf = {fitted}, a = {fitted}, b = {fitted}", report
    )
    assert re.search(rf"\| vq \| log2 line \| c = {fitted}, d = {fitted}", report)


def test_plots_have_no_other_plot_of_an_earlier_report(tmp_path):
    directory = written_study(tmp_path / "s", sizes=(4,), seeds=(1,), routers=("vq",))
    stale = directory / "report" / "routing.png"
    stale.parent.mkdir()
    replace_recorded(stale.parent, {stale.name: b"old"}, [], "an earlier report")
    log = directory / "runs" / "experts4-vq-ranks1-seed1" / "metrics.jsonl"
    log.write_text('{"iteration": 40, "consumed_tokens": 10240, "val/loss": 1.5}\n')
    report = (write_report(directory).folder / "report.md").read_text()
    assert not stale.exists()
    assert "No plot routing.png: no finished run has routing metrics" in report
    assert "not determined: three parameters need at least 4" in report


def test_a_study_without_any_result_is_reported_all_the_same(tmp_path):
    states = {f"experts4-vq-ranks1-seed{seed}": ("pending", 0) for seed in (1, 2)}
    directory = written_study(tmp_path / "s", sizes=(4,), routers=("vq",), states=states)
    report = (write_report(directory).folder / "report.md").read_text()
    assert "0 finished, 2 not" in report
    assert "No plot loss_experts.png: no finished run has a finite validation loss" in report


@pytest.mark.full
def test_the_parent_run_gets_the_report(tmp_path):
    directory = written_study(tmp_path / "s", sizes=(4,), seeds=(1,), routers=("vq",))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_id = open_parent_run(uri, "vqmoe", "study", {"vqmoe.study_dir": str(directory)})
    parent = directory / "mlflow_parent.json"
    parent.write_text(json.dumps({"uri": uri, "run_id": run_id}))
    said = []
    folder = write_report(directory, say=said.append).folder
    assert said == []
    logged = {file.path for file in MlflowClient(uri).list_artifacts(run_id)}
    assert logged == {file.name for file in folder.iterdir()} - {RECORD_FILE}


def test_foreign_files_of_the_folder_are_not_sent_to_the_parent_run(tmp_path, monkeypatch):
    directory = written_study(tmp_path / "s", sizes=(4,), seeds=(1,), routers=("vq",))
    (directory / "mlflow_parent.json").write_text('{"uri": "x", "run_id": "1"}')
    (tmp_path / "thesis.tex").write_text("mine")
    sent = []
    monkeypatch.setattr(
        write, "log_parent_artifacts", lambda uri, run, folder: sent.extend(folder.iterdir())
    )
    write_report(directory, tmp_path)
    names = {file.name for file in sent}
    assert {"runs.csv", "report.md", "index.html"} <= names and "thesis.tex" not in names


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("foreign", "index.html"),
        ("foreign", "loss_experts.png"),
        ("edited", "report.md"),
        ("edited", "runs.csv"),
    ],
)
def test_a_file_that_is_not_as_the_report_left_it_is_kept(tmp_path, name, kind):
    directory = written_study(tmp_path / "s", sizes=(4,), seeds=(1,), routers=("vq",))
    out = tmp_path / "out"
    out.mkdir()
    if kind == "edited":
        write_report(directory, out)
    with (out / name).open("a") as stream:
        stream.write("mine")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(ValueError, match=f"{name} is there already, and vqmoe study report did"):
        write_report(directory, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


@pytest.mark.parametrize("content", ['{"uri": "nowhere://x", "run_id": "1"}', "{", "[]"])
def test_tracking_that_fails_is_said_and_not_raised(tmp_path, content):
    (tmp_path / "mlflow_parent.json").write_text(content)
    said = []
    log_to_parent(tmp_path / "mlflow_parent.json", {"report.md": b"text"}, said.append)
    (line,) = said
    assert line.startswith("mlflow: the report was not logged to the parent run: ")


def test_wrong_input_is_one_sentence(tmp_path):
    directory = written_study(tmp_path / "s", sizes=(4,), seeds=(1,), routers=("vq",))
    with pytest.raises(ValueError, match="hardware 'X9' is not known"):
        write_report(directory, hardware="X9")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="report cannot be written: .*choose another place"):
        write_report(directory, tmp_path / "file" / "report")


@pytest.mark.full
def test_a_really_trained_run_is_reported_with_its_own_figures(write_study, vqmoe, tmp_path):
    """The formats that training writes are the ones that the report reads."""
    changes = {"more": ["train.eval_iters=1", "tracking.mlflow=false"]}
    file = write_study(**changes, grid={"experts": [4], "seed": [1, 2]})
    code, shown = vqmoe("study", "run", file, "--only", "0")
    assert code == 0, shown
    code, shown = vqmoe("study", "report", file)
    assert code == 0 and "1 of 2 runs finished" in shown and "waiting" in shown
    study = tmp_path / "study"
    with (study / "report" / "runs.csv").open() as lines:
        trained, waiting = list(csv.DictReader(lines))
    records = read_metrics(study / "runs" / trained["name"])
    assert float(trained["final_val_loss"]) == records[-1]["val/loss"]
    assert int(trained["num_tokens"]) == 8 * 4 * 16  # steps, batch, sequence
    assert trained["state"] == "finished" and waiting["state"] == "waiting"
    assert trained["num_parameters_total"] == waiting["num_parameters_total"] != ""


def test_a_reason_with_brackets_is_shown_as_it_is(tmp_path):
    name = "experts4-vq-ranks1-seed1"
    states = {name: ("failed", 9)}
    directory = written_study(
        tmp_path / "s", sizes=(4,), routers=("vq",), seeds=(1,), states=states
    )
    write_status(directory / "runs" / name, "failed", 9, "cannot read [/data/x] of [bold]y")
    shown = CliRunner().invoke(cli.app, ["study", "report", str(directory), "--hardware", "CPU"])
    assert shown.exit_code == 0, shown.output
    words = shown.output.split()
    assert "[/data/x]" in words and "[bold]y" in words
