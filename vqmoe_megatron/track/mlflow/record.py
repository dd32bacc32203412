"""``mlflow.json``: what a run directory knows of its MLflow run, beside ``metrics.jsonl``.

- ``run_key``: a name made before anything is sent and given to the MLflow run as a tag. A process
  killed between creating a run and noting its id finds that run again.
- ``runs``: run id by store, because a run made offline can be sent to a server later.
- ``tags``, ``num_attempts``: what a server that was down has not heard yet.
- ``is_completed``: the run reached its end.

Written atomically by one process at a time: rank 0 of the run, or ``vqmoe mlflow-sync`` after it.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vqmoe_megatron.rundir.atomic import replace_file
from vqmoe_megatron.rundir.file_names import MLFLOW_FILE


@dataclass
class RecordContent:
    """The fields of ``mlflow.json``; the file's head says what they are for."""

    run_key: str = field(default_factory=lambda: uuid.uuid4().hex)
    runs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    num_attempts: int = 0
    is_completed: bool = False


class MlflowRecord:
    """``<run_dir>/mlflow.json``; every change is on disk when its call returns.

    Safe to use from several threads. A file that cannot be written is reported, never raised.
    """

    def __init__(
        self, run_dir: str | Path, content: RecordContent, report: Callable[[str], None]
    ) -> None:
        self.path = Path(run_dir) / MLFLOW_FILE
        self._content = content
        self._report = report
        self._lock = threading.Lock()

    @property
    def run_key(self) -> str:
        """The run's own name."""
        return self._content.run_key

    @property
    def tags(self) -> dict[str, str]:
        """Every tag ever set, the latest values."""
        with self._lock:
            return dict(self._content.tags)

    @property
    def num_attempts(self) -> int:
        """How often the run was started."""
        return self._content.num_attempts

    @property
    def is_completed(self) -> bool:
        """Whether the latest attempt reached the run's end."""
        return self._content.is_completed

    def known_run(self, uri: str) -> str | None:
        """Return the id of the run at ``uri``, None when none was opened there."""
        with self._lock:
            return self._content.runs.get(uri.rstrip("/"))

    def note_run(self, uri: str, run_id: str) -> None:
        """Remember the run's id at ``uri``."""
        with self._lock:
            self._content.runs[uri.rstrip("/")] = run_id
            self._write()

    def note_tags(self, tags: dict[str, str]) -> None:
        """Remember tags, replacing earlier values."""
        with self._lock:
            self._content.tags |= tags
            self._write()

    def begin_attempt(self) -> int:
        """Count one more start of this run; return its number, the first is 1."""
        with self._lock:
            self._content.num_attempts += 1
            self._content.is_completed = False
            self._write()
            return self._content.num_attempts

    def note_completed(self) -> None:
        """Remember that the run reached its end."""
        with self._lock:
            self._content.is_completed = True
            self._write()

    def forget(self) -> None:
        """Begin another run in the same directory."""
        with self._lock:
            self._content = RecordContent()
            self._write()

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, json.dumps(asdict(self._content), indent=2) + "\n")
        except OSError as error:
            self._report(f"{self.path} cannot be written: {error}")


def open_record(run_dir: str | Path, report: Callable[[str], None]) -> MlflowRecord:
    """Read the directory's record; a new one where there is none, or a damaged one (reported)."""
    path = Path(run_dir) / MLFLOW_FILE
    content = RecordContent()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        content = RecordContent(
            str(found["run_key"]),
            {str(uri): str(run_id) for uri, run_id in found["runs"].items()},
            {str(name): str(text) for name, text in found["tags"].items()},
            int(found["num_attempts"]),
            bool(found["is_completed"]),
        )
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        report(f"{path} is damaged ({error}); the run may get a second MLflow run")
    return MlflowRecord(run_dir, content, report)
