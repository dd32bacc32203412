"""Writing a report: CSV, Markdown with PNGs, one HTML page; and its way to MLflow.

Every file is replaced whole, the page last, so a reader never sees half of one, and only where it
is as the last report left it (own_outputs.py).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from vqmoe_megatron.bench.origin import origin
from vqmoe_megatron.plan.hardware import hardware_profile
from vqmoe_megatron.rundir.own_outputs import check_recorded, replace_recorded, said_as_refusal
from vqmoe_megatron.study.report.content import PLOT_NAMES, build_page
from vqmoe_megatron.study.report.page import html_page, markdown
from vqmoe_megatron.study.report.planned import machine_profile
from vqmoe_megatron.study.report.run_table import ReportedStudy, csv_text, read_study
from vqmoe_megatron.study.study_folder import StudyFolder
from vqmoe_megatron.track.mlflow.parent_run import log_parent_artifacts

TEXT_NAMES = ("runs.csv", "report.md", "index.html")  # written in this order, after the plots
WRITER = "vqmoe study report"


@dataclass(frozen=True)
class WrittenReport:
    """Where the report is, and the study it is about."""

    folder: Path
    study: ReportedStudy

    @property
    def page(self) -> Path:
        """The HTML page."""
        return self.folder / "index.html"


def write_report(
    path: Path,
    out: Path | None = None,
    hardware: str | None = None,
    say: Callable[[str], None] = print,
) -> WrittenReport:
    """Report the study of a YAML file or a study directory; works while it is running.

    ``out`` is the folder to write to, by default ``report`` in the study's directory;
    ``hardware`` the profile of the predictions, by default this machine's. Where the
    study has an MLflow parent run, the files are logged to it; a failure of that is said, no more.

    Raises:
        ValueError: when there is no such study, it has no runs yet, ``hardware`` is not known,
            ``out`` cannot be written, or a file in it is not as the last report left it.
    """
    made_here = origin()
    if hardware is None:
        profile = machine_profile(made_here["machine"]["gpu"])
    else:
        profile = hardware_profile(hardware).name
    study = read_study(Path(path), profile)
    folder = Path(out) if out is not None else study.path / "report"
    check_recorded(folder, (*TEXT_NAMES, *PLOT_NAMES), WRITER)
    with said_as_refusal(folder):
        folder.mkdir(parents=True, exist_ok=True)
    page = build_page(study, made_here, datetime.now(timezone.utc))
    files = {plot.file_name: plot.png for section in page.sections for plot in section.plots}
    texts = (csv_text(study), markdown(page), html_page(page))
    files |= {name: text.encode() for name, text in zip(TEXT_NAMES, texts, strict=True)}
    with said_as_refusal(folder):
        replace_recorded(folder, files, PLOT_NAMES, WRITER)
    log_to_parent(StudyFolder(study.path).mlflow_parent, files, say)
    return WrittenReport(folder, study)


def log_to_parent(record: Path, files: Mapping[str, bytes], say: Callable[[str], None]) -> None:
    """Hand ``files`` to the parent run that ``record`` names, if there is one.

    Tracking never fails a report: nothing is raised, what went wrong is said.
    """
    if not record.is_file():
        return
    try:
        parent = json.loads(record.read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory() as folder:  # the report's may hold files of others
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            log_parent_artifacts(parent["uri"], parent["run_id"], Path(folder))
    except Exception as error:  # whatever a store, a network or a damaged record can do
        say(f"mlflow: the report was not logged to the parent run: {error}")
