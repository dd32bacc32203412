"""What a checkout did, kept under the name of its code, so that it is observed once."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from checkout import Checkout

HERE = Path(__file__).resolve().parent
# What only judges and shows; every other file here decides what is observed.
NOT_OBSERVING = ("__main__.py", "differences.py", "report.py", "kept_results.py")


class KeptResults:
    """A folder of observations (JSON) and run directories of one checkout.

    Its name is made of git's name of the code, of the files that observe, and of interpreter,
    versions and processor (``setting``): with another of these nothing is found. What a checkout
    with uncommitted changes does is not kept at all.
    """

    def __init__(self, cache: Path | None, checkout: Checkout, setting: str) -> None:
        self.folder: Path | None = None
        if cache is not None and checkout.code is not None:
            digest = hashlib.sha256(f"{setting} {checkout.python}".encode())
            for file in sorted(HERE.glob("*.py")):
                if file.name not in NOT_OBSERVING:
                    digest.update(file.read_bytes())
            self.folder = cache.resolve() / f"{checkout.code}-{digest.hexdigest()[:12]}"
            self.folder.mkdir(parents=True, exist_ok=True)

    def observation(self, scenario: str) -> dict[str, Any] | None:
        """Return what was observed, or None."""
        file = self._place(f"{scenario}.json")
        return json.loads(file.read_text()) if file is not None and file.is_file() else None

    def keep_observation(self, scenario: str, observation: dict[str, Any]) -> None:
        """Keep it, complete or not at all."""
        if (file := self._place(f"{scenario}.json")) is not None:
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(observation, indent=1))
            partial.replace(file)

    def directory(self, name: str) -> Path | None:
        """Return a kept directory, or None."""
        folder = self._place(name)
        return folder if folder is not None and folder.is_dir() else None

    def keep_directory(self, name: str, source: Path) -> None:
        """Keep a copy of ``source``, complete or not at all."""
        if (folder := self._place(name)) is not None:
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a copy that was interrupted
            shutil.copytree(source, partial, symlinks=True)
            partial.rename(folder)

    def _place(self, name: str) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / name.replace(" ", "_").replace("/", "_")
