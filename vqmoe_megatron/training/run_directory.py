"""One object for every path of a run directory, for writers and readers alike."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


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
