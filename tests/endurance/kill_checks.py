"""What has to be true after a hit, and of the whole curve; each check returns its problems."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field

from killed_run import KilledRun

from vqmoe_megatron.checkpoint.folder import CORPUS_COPY, LAYOUT_FILE, find_checkpoint
from vqmoe_megatron.metrics.table import SINCE_START_METRICS
from vqmoe_megatron.rundir.file_names import CONFIG_FILE
from vqmoe_megatron.rundir.status import read_status

CHECKPOINT_FILES = ("metadata.json", ".metadata", "common.pt")
# What depends on the clock and the machine; everything else is compared.
UNEQUAL_METRICS = {
    "timestamp_ms",
    "tokens_per_second",
    "step_time_ms",
    "overhead_share",
    "memory/peak_rss_bytes",
}


@dataclass
class Round:
    """One start of the run and how it ended."""

    number: int
    action: str
    checkpoint_before: int
    moment: str = ""  # start-up | training | inside a save | after a save
    last_iteration: int = 0  # logged before the end
    checkpoint_after: int = 0
    exit_code: int | None = None
    seconds_to_hit: float = 0.0
    seconds_to_end: float = 0.0  # from the hit until no process was left
    problems: list[str] = field(default_factory=list)


def outcome_problems(run: KilledRun, current: Round, victim: int) -> list[str]:
    """Exit code and status.json against the contract of the action."""
    status, log = read_status(run.dir), run.log.read_text()
    problems = []

    def expect(what: str, is_so: bool) -> None:
        if not is_so:
            problems.append(f"expected {what!r}: exit code {current.exit_code}, {status}")

    if current.action in ("sigterm-one", "sigusr1-all"):
        expect("exit code 75", current.exit_code == 75)
        expect("requeue", status is not None and status.state == "requeue")
        # Before the ranks have met, the run ends without a step and without a save.
        reasons = ("received a stop signal", "was asked to stop")
        expect("says why", any(reason in getattr(status, "reason", "") for reason in reasons))
        expect(
            "saved where it stopped",
            status is not None and status.iteration == run.newest_checkpoint(),
        )
        is_logged = current.last_iteration == run.newest_checkpoint() or not run.is_training()
        expect("logged what it saved", is_logged)
        expect("no traceback", "Traceback" not in log)
    elif current.action == "kill-one":
        expect("exit code 137", current.exit_code == 128 + signal.SIGKILL)
        expect("failed", status is not None and status.state == "failed")
        expect(
            "names the rank",
            f"rank {victim} was killed by SIGKILL" in getattr(status, "reason", ""),
        )
    else:  # nobody is left to write a status
        expect("ended by SIGKILL", current.exit_code == -signal.SIGKILL)
        expect("still running", status is not None and status.state == "running")
    expect("never ahead", status is None or status.iteration <= max(1, current.last_iteration))
    return problems


def checkpoint_problems(run: KilledRun, current: Round) -> list[str]:
    """The newest checkpoint is complete and not older than before; the start was from it."""
    problems = []
    folder = find_checkpoint(run.dir)
    for name in (*CHECKPOINT_FILES, CONFIG_FILE, LAYOUT_FILE, CORPUS_COPY):
        if folder is not None and not (folder / name).stat().st_size:
            problems.append(f"{folder.name}/{name} is empty")
    if current.checkpoint_after < current.checkpoint_before:
        problems.append("the newest checkpoint is older than before")
    if current.moment != "start-up" and current.checkpoint_before:
        expected = f"resumed from {run.dir}/checkpoints/iter_{current.checkpoint_before:07d}"
        if expected not in " ".join(run.log.read_text().split()):
            problems.append(f"not {expected}")
    return problems


def curve_problems(killed: list[dict], whole: list[dict]) -> list[str]:
    """Compare two runs' records, bit for bit; empty when they are the same curve."""
    iterations = [record["iteration"] for record in killed]
    if iterations != [record["iteration"] for record in whole]:
        return [f"iterations differ: {iterations}"]
    problems = []
    for ours, theirs in zip(killed, whole, strict=True):
        differing = [
            f"{name} {ours.get(name)!r} != {theirs.get(name)!r}"
            for name in sorted({*ours, *theirs} - UNEQUAL_METRICS)
            if ours.get(name) != theirs.get(name) and not name.endswith(SINCE_START_METRICS)
        ]
        if differing:
            problems.append(f"iteration {ours['iteration']:.0f}: {', '.join(differing[:4])}")
    return problems
