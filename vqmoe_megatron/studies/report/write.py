"""Writing a report: CSV, Markdown with PNGs, one HTML page; and its way to MLflow.

Every file is replaced whole, the page last, so a reader never sees half of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from vqmoe_megatron.bench.origin import origin
from vqmoe_megatron.plan.hardware import hardware_profile
from vqmoe_megatron.studies.report.content import PLOT_NAMES, build_page
from vqmoe_megatron.studies.report.page import html_page, markdown
from vqmoe_megatron.studies.report.planned import machine_profile
from vqmoe_megatron.studies.report.run_table import Study, csv_text, read_study
from vqmoe_megatron.tracking.parent_run import log_parent_artifacts

PARENT_FILE = "mlflow_parent.json"


@dataclass(frozen=True)
class WrittenReport:
    """Where the report is, and the study it is about."""

    folder: Path
    study: Study

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
        ValueError: when there is no such study, it has no runs yet, ``hardware`` is not known, or
            ``out`` cannot be written.
    """
    made_here = origin()
    if hardware is None:
        profile = machine_profile(made_here["machine"]["gpu"])
    else:
        profile = hardware_profile(hardware).name
    study = read_study(Path(path), profile)
    folder = Path(out) if out is not None else study.path / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(folder, error) from error
    page = build_page(study, made_here, datetime.now(timezone.utc))
    plots = {plot.file_name: plot.png for section in page.sections for plot in section.plots}
    files = {
        **plots,
        "runs.csv": csv_text(study).encode(),
        "report.md": markdown(page).encode(),
        "index.html": html_page(page).encode(),
    }
    try:
        for name, content in files.items():
            _replace(folder / name, content)
        for name in set(PLOT_NAMES) - set(plots):  # of an earlier report
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise _refused(folder, error) from error
    log_to_parent(study.path / PARENT_FILE, folder, say)
    return WrittenReport(folder, study)


def _refused(folder: Path, error: OSError) -> ValueError:
    return ValueError(
        f"the report cannot be written to {folder}: {error.strerror}; choose another with --out"
    )


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def log_to_parent(record: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Hand the files of ``folder`` to the parent run that ``record`` names, if there is one.

    Tracking never fails a report: nothing is raised, what went wrong is said.
    """
    if not record.is_file():
        return
    try:
        parent = json.loads(record.read_text(encoding="utf-8"))
        log_parent_artifacts(parent["uri"], parent["run_id"], folder)
    except Exception as error:  # whatever a store, a network or a damaged record can do
        say(f"mlflow: the report was not logged to the parent run: {error}")
