"""One object for every path of a run directory, for writers and readers alike."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vqmoe_megatron.tracking.run_status import read_status, write_status


@dataclass(frozen=True)
class RunDirectory:
    """The layout of ``train.output_dir``."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved recipe."""
        return self.path / "run_config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Holds ``iter_0000100/`` folders and the tracker file."""
        return self.path / "checkpoints"

    @property
    def routing(self) -> Path:
        """Expert load and code usage of the last logged steps."""
        return self.path / "routing.npz"

    def create(self) -> None:
        """Make the directory and prove that it can be written.

        Raises:
            ValueError: when it cannot be created or written.
        """
        probe = self.path / f".write_probe_{os.getpid()}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"train.output_dir={self.path} cannot be written: {error.strerror}; choose another "
                "with train.output_dir=DIR"
            ) from error

    def record_failure(self, reason: str, is_first_cause: bool = False) -> None:
        """Set the status to failed, at the iteration it has.

        When one rank fails the others fail for want of it. So a failure that is already recorded
        keeps its reason, unless ``is_first_cause``. For any process.

        Raises:
            OSError: when the directory cannot be written.
        """
        known = read_status(self.path)
        if known is not None and known.state == "failed" and not is_first_cause:
            return
        iteration, run_id = (known.iteration, known.mlflow_run_id) if known else (0, None)
        write_status(self.path, "failed", iteration, reason, run_id)
