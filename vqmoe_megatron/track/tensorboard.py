"""TensorBoard: event files in ``RUN_DIR/tensorboard``, readable while the run trains.

``tracking.also=[tensorboard]``, then ``tensorboard --logdir runs``. Every metric of the logs is a
scalar of the same name, at its iteration and time; plots are images; the recipe is a text.

An attempt writes an event file of its own and says in its first event from which step on earlier
files do not count, which TensorBoard's reader follows: steps that are trained again appear once.
``vqmoe.json`` beside the files says how far they go, so that an attempt writes what a killed one
had not, and all of it where the run was not tracked here before.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vqmoe_megatron.rundir.atomic import replace_file
from vqmoe_megatron.runtime.optional_packages import require
from vqmoe_megatron.track.log_follower import LOGS, LogFollower
from vqmoe_megatron.track.metrics_tail import Record
from vqmoe_megatron.track.tracker import TrackedRun, Tracker

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

FOLDER = "tensorboard"
POSITION_FILE = "vqmoe.json"
NOT_VALUES = ("iteration", "timestamp_ms")
PNG_SIZE = slice(16, 24)  # width and height, big-endian, of the header


class TensorBoardTracker(LogFollower):
    """Writes event files of one run; see the file's head."""

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(run, "tensorboard")
        self.folder = run.run_dir / FOLDER

    @classmethod
    def open(cls, run: TrackedRun) -> Tracker:
        """Begin an attempt.

        Raises:
            ValueError: without the package tensorboard.
        """
        require("tensorboard", "tracking.also=[tensorboard]")
        return cls(run).start()

    def log_params(self, params: Mapping[str, object]) -> None:
        """The recipe as a table."""
        lines = ["| key | value |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in params.items()]
        self.call(lambda: self._add_text("recipe", "\n".join(lines)))

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """A line of text each."""
        text = "\n\n".join(f"{key}: {value}" for key, value in tags.items())
        self.call(lambda: self._add_text("tags", text))

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A PNG is shown; other files stay where they are."""
        if Path(path).suffix == ".png":
            self.call(lambda: self._add_image(Path(path)))

    # In the thread.
    def begin(self) -> dict[str, int]:
        """Open an event file that continues the earlier ones."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.folder.mkdir(exist_ok=True)
        self._last = dict.fromkeys(LOGS, -1)
        if self.run.is_same:
            self._last |= self._read_position()
        reached = [last for last in self._last.values() if last >= 0]
        common = min([self.run.start_iteration, *reached]) if reached else -1
        self._last = {log: min(last, common) for log, last in self._last.items()}
        self._writer = EventFileWriter(str(self.folder))
        self._discard_after(common)
        return dict(self._last)

    def _read_position(self) -> dict[str, int]:
        try:
            found = json.loads((self.folder / POSITION_FILE).read_text(encoding="utf-8"))
            return {log: int(found[log]) for log in LOGS}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._tell(f"{POSITION_FILE} is damaged ({error}); all is written again")
            return {}

    def write(self, log: str, records: list[Record]) -> None:
        """As scalars, on disk when this returns."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for record in records:
            values = [
                Summary.Value(tag=name, simple_value=float(value))
                for name, value in record.items()
                if name not in NOT_VALUES
            ]
            time_s = record.get("timestamp_ms", 1e3 * time.time()) / 1e3
            self._add(Summary(value=values), int(record["iteration"]), time_s)
        self._writer.flush()
        self._note(log, int(records[-1]["iteration"]))

    def cut(self, iteration: int) -> None:
        """Let readers discard later steps."""
        self._discard_after(iteration)
        for log in LOGS:
            self._note(log, min(self._last[log], iteration))

    def end(self, state: str) -> None:
        """Close the event file."""
        self._writer.close()

    def _note(self, log: str, iteration: int) -> None:
        self._last[log] = iteration
        replace_file(self.folder / POSITION_FILE, json.dumps(self._last) + "\n")

    def _discard_after(self, iteration: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        event = Event(wall_time=time.time(), step=max(0, iteration + 1), session_log=start)
        self._writer.add_event(event)

    def _add(self, summary: Summary, iteration: int, time_s: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time_s, step=iteration, summary=summary))

    def _add_text(self, tag: str, text: str) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        summary = text_pb(tag, text)
        self._add(summary, self.run.start_iteration, time.time())

    def _add_image(self, path: Path) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        content = path.read_bytes()
        width, height = struct.unpack(">II", content[PNG_SIZE])
        image = Summary.Image(
            encoded_image_string=content, width=width, height=height, colorspace=4
        )
        value = Summary.Value(tag=f"plots/{path.stem}", image=image)
        self._add(Summary(value=[value]), max(0, *self._last.values()), time.time())
