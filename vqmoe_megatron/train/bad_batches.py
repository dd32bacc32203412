"""Steps with a non-finite loss or gradient: their record, and where a rollback goes on.

A rollback follows PaLM (arXiv 2204.02311, section 5.1): go back to a checkpoint and pass over the
data between it and the bad batch, this one included. The same data would lead to the same place.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vqmoe_megatron.checkpoint.folder import iteration_of
from vqmoe_megatron.checkpoint.state import Progress

MAX_ROLLBACKS = 3  # to one checkpoint; then the trouble is in it, or before it


@dataclass(frozen=True)
class BadBatch:
    """A bad step. Samples are counted in the run's shuffled order, which the seed decides.

    Beyond the end of the order they are those at its beginning.
    """

    iteration: int
    first_sample: int
    last_sample: int
    loss: str  # a number, nan or inf, in the spelling of Python
    policy: str

    @classmethod
    def of(cls, before: Progress, batch: int, loss: float, policy: str) -> BadBatch:
        """The step that started at ``before`` with ``batch`` samples."""
        first = before.consumed_samples + before.passed_over_samples
        return cls(before.iteration + 1, first, first + batch - 1, repr(loss), policy)

    @property
    def text(self) -> str:
        """One line for people."""
        return (
            f"iteration {self.iteration}: non-finite loss or gradient on samples "
            f"{self.first_sample}..{self.last_sample}"
        )


def record_bad_batch(path: Path, bad: BadBatch) -> None:
    """Append ``bad`` to a file of JSON lines. For one process."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(bad)) + "\n")


def check_rollback(bad: BadBatch, folder: Path | None, num_rollbacks: dict[int, int]) -> None:
    """Count a rollback to the checkpoint ``folder``.

    Raises:
        FloatingPointError: when there is no checkpoint, or it has been gone back to too often.
    """
    if folder is None:
        raise FloatingPointError(
            f"{bad.text}; train.nan_policy=rollback, but there is no checkpoint yet"
        )
    iteration = iteration_of(folder)
    num_rollbacks[iteration] = num_rollbacks.get(iteration, 0) + 1
    if num_rollbacks[iteration] > MAX_ROLLBACKS:
        raise FloatingPointError(f"{bad.text}; went back to {folder} {MAX_ROLLBACKS} times before")


def after_the_bad_batch(loaded: Progress, bad: BadBatch, mlflow_run_id: str | None) -> Progress:
    """Return ``loaded`` with its data position moved behind the bad batch."""
    return replace(
        loaded,
        passed_over_samples=bad.last_sample + 1 - loaded.consumed_samples,
        mlflow_run_id=mlflow_run_id,
    )
