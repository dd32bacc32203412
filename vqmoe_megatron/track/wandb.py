"""Weights & Biases: ``tracking.also=[wandb]``.

The account is W&B's own business: ``wandb login`` or ``WANDB_API_KEY``; ``WANDB_MODE=offline``
keeps everything in ``RUN_DIR/wandb`` for a later ``wandb sync``. The project is
``tracking.experiment``, the run's name ``tracking.run_name``. Metrics have the names of the logs
and are drawn over ``iteration``. An attempt goes on in the run of the one before, by the id in
``wandb.json``.

W&B only appends: steps that are trained again after a resume are points beside the first ones, as
the logs, which hold the last ones alone, are not. No code, environment, host or output is sent.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vqmoe_megatron.rundir.atomic import replace_file
from vqmoe_megatron.runtime.optional_packages import require
from vqmoe_megatron.track.log_follower import LOGS, LogFollower
from vqmoe_megatron.track.metrics_tail import Record
from vqmoe_megatron.track.tracker import TrackedRun, Tracker

RECORD_FILE = "wandb.json"
SWITCH = "tracking.also=[wandb]"
QUIET = {
    "silent": True,
    "console": "off",
    "disable_git": True,
    "save_code": False,
    "x_disable_meta": True,
    "x_disable_stats": True,
}


class WandbTracker(LogFollower):
    """Sends a run to Weights & Biases; see the file's head."""

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(run, "wandb")
        self._record_path = run.run_dir / RECORD_FILE
        self._store: Any = None

    @classmethod
    def open(cls, run: TrackedRun) -> Tracker:
        """Begin an attempt; what needs the network is done in the thread.

        Raises:
            ValueError: without the package wandb, or an account where W&B would ask for one.
        """
        require("wandb", SWITCH)
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.api.api_key:
            raise ValueError(
                f"{SWITCH} is not possible: W&B knows no account here; run `wandb login`, set "
                "WANDB_API_KEY, or WANDB_MODE=offline for a later `wandb sync`"
            )
        return cls(run).start()

    def log_params(self, params: Mapping[str, object]) -> None:
        """As the run's config; a resumed run's values replace the earlier ones."""
        self.call(lambda: self._store.config.update(dict(params), allow_val_change=True))

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """As config, under ``tag/``."""
        named = {f"tag/{key}": value for key, value in tags.items()}
        self.call(lambda: self._store.config.update(named, allow_val_change=True))

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A PNG as an image; other files among the run's."""
        self.call(lambda: self._send_file(Path(path)))

    # In the thread.
    def begin(self) -> dict[str, int]:
        """Open the run of the attempt before, or a new one."""
        import wandb

        known = self._read_record() if self.run.is_same else {}
        self._record: dict[str, Any] = {"id": known.get("id") or secrets.token_hex(4)}
        self._record |= {log: min(known.get(log, -1), self.run.start_iteration) for log in LOGS}
        replace_file(self._record_path, json.dumps(self._record) + "\n")
        tracking = self.run.config.tracking
        self._store = wandb.init(
            project=tracking.experiment,
            name=tracking.run_name or self.run.run_dir.name,
            id=self._record["id"],
            resume="allow",
            dir=str(self.run.run_dir),
            settings=wandb.Settings(**QUIET),
        )
        self._store.define_metric("*", step_metric="iteration")
        return {log: self._record[log] for log in LOGS}

    def _read_record(self) -> dict[str, Any]:
        try:
            found = json.loads(self._record_path.read_text(encoding="utf-8"))
            return {"id": str(found["id"]), **{log: int(found[log]) for log in LOGS}}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._tell(f"{RECORD_FILE} is damaged ({error}); a new run is begun")
            return {}

    def write(self, log: str, records: list[Record]) -> None:
        """Hand records over; W&B's own process keeps and sends them."""
        for record in records:
            values = {name: value for name, value in record.items() if name != "timestamp_ms"}
            self._store.log({**values, "_timestamp": record.get("timestamp_ms", 0) / 1e3})
        self._record[log] = int(records[-1]["iteration"])
        replace_file(self._record_path, json.dumps(self._record) + "\n")

    def cut(self, iteration: int) -> None:
        """The new steps are sent, too."""
        for log in LOGS:
            self._record[log] = min(self._record[log], iteration)

    def _send_file(self, path: Path) -> None:
        import wandb

        if path.suffix == ".png":
            self._store.log({f"plots/{path.stem}": wandb.Image(str(path))})
        else:
            self._store.save(str(path), base_path=str(self.run.run_dir), policy="now")

    def end(self, state: str) -> None:
        """Set how the run ended; one that will be resumed is marked so."""
        self._store.summary["state"] = state
        self._store.finish(exit_code=1 if state == "failed" else 0)
