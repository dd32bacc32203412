"""Trying again in the background until a store answers: one notice per outage, one at its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal

from vqmoe_megatron.track.mlflow.errors import explained, is_permanent

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
ATTEMPTS_WHILE_FINISHING = 3


class StoreRetry:
    """Runs actions against the store at ``uri`` for one thread.

    Args:
        uri: for the notices.
        finishing: set when the run is over and time is short.
        settled: set when an action has failed for the first time: nobody should wait for it.
        report: receives notices.
    """

    def __init__(
        self,
        uri: str,
        finishing: threading.Event,
        settled: threading.Event,
        report: Callable[[str], None],
    ) -> None:
        self._uri, self._finishing, self._settled = uri, finishing, settled
        self._report = report
        self._refusals: set[str] = set()

    def run(
        self, what: str, action: Callable[[], None], max_attempts: int | None = None
    ) -> Literal["done", "refused", "unreachable"]:
        """Run ``action`` until it succeeds, is refused for good, or its attempts are used up.

        ``max_attempts=None`` tries for as long as training runs; once it is finishing, the attempts
        still allowed are :data:`ATTEMPTS_WHILE_FINISHING`.
        """
        pause_s, num_failed, num_failed_finishing = FIRST_PAUSE_S, 0, 0
        while True:
            try:
                action()
            except Exception as error:  # tracking must never end training: reported and counted
                num_failed += 1
                num_failed_finishing += self._finishing.is_set()
                text = f"{what} at {self._uri}: {explained(error, self._uri)}"
                self._settled.set()
                if is_permanent(error):
                    self._report_refusal(text)
                    return "refused"
                if num_failed == 1:
                    self._report(f"{text}; trying again in the background")
                if ATTEMPTS_WHILE_FINISHING == num_failed_finishing or num_failed == max_attempts:
                    return "unreachable"
                self._pause(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                if num_failed:
                    self._report(f"{self._uri} answers again")
                return "done"

    def _report_refusal(self, text: str) -> None:
        if text not in self._refusals:  # a deleted run refuses every record alike
            self._refusals.add(text)
            self._report(f"{text}; not tried again")

    def _pause(self, pause_s: float) -> None:
        """Wait, ended early by the start of finishing, and only briefly once it has begun."""
        if self._finishing.is_set():
            time.sleep(FIRST_PAUSE_S)
        else:
            self._finishing.wait(pause_s)
