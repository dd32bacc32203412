"""What one optimizer step sends, as a table: part, collective, axis, calls, bytes.

Axes are the process groups by the parallel sizes they span; context parallelism is refused, so it
is left out of the names:

    tp       tensor-parallel ranks           pp             pipeline stages
    ep       expert-parallel ranks           expt_tp        expert-tensor ranks
    dp       replicas of the dense layers    expt_dp        replicas of the experts
    tp_dp    replicas of a codebook          world          all ranks
    tp_pp    one copy of the dense layers    expt_tp_ep_pp  one copy of the experts
    embedding  first and last stage of a pipeline, with tied embeddings
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from vqmoe_megatron.plan.exact import Exact, exact

AXES = (
    "tp",
    "ep",
    "expt_tp",
    "pp",
    "dp",
    "expt_dp",
    "tp_dp",
    "embedding",
    "tp_pp",
    "expt_tp_ep_pp",
    "world",
)
COLLECTIVES = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce", "broadcast", "send")


@dataclass(frozen=True)
class StepTerm:
    """Collectives of one kind, for one purpose, over one axis: what one rank sends in a step."""

    part: str  # attention | dense_mlp | moe | embedding | output | pipeline | gradients | ...
    collective: str  # one of COLLECTIVES
    axis: str  # one of AXES
    num_calls: int
    sent_bytes: Exact  # of all calls together


@dataclass(frozen=True)
class StageWire:
    """One rank of one pipeline stage; all ranks of a stage send the same, loads being balanced."""

    pipeline_rank: int
    terms: tuple[StepTerm, ...]

    @property
    def sent_bytes(self) -> Exact:
        """Of the whole step."""
        return _total(self.terms)

    @property
    def by_axis(self) -> dict[str, Exact]:
        """Bytes by axis; axes that carry nothing are left out."""
        return {
            axis: _total(term for term in self.terms if term.axis == axis)
            for axis in AXES
            if any(term.axis == axis for term in self.terms)
        }

    @property
    def by_collective(self) -> dict[tuple[str, str], tuple[int, Exact]]:
        """Calls and bytes by (collective, axis): what a counter sees."""
        found: dict[tuple[str, str], tuple[int, Exact]] = {}
        for term in self.terms:
            calls, sent = found.get((term.collective, term.axis), (0, 0))
            found[term.collective, term.axis] = (
                calls + term.num_calls,
                exact(Fraction(sent) + term.sent_bytes),
            )
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class StepWire:
    """One optimizer step of a run, stage by stage."""

    stages: tuple[StageWire, ...]
    assumptions: tuple[str, ...]  # sentences: what the bytes rest on

    @property
    def sent_bytes(self) -> Exact:
        """Of a rank of the stage that sends most."""
        return max(stage.sent_bytes for stage in self.stages)

    @property
    def by_axis(self) -> dict[str, Exact]:
        """Bytes by axis, each of the stage that sends most along it."""
        of_stages = [stage.by_axis for stage in self.stages]
        return {
            axis: max(of.get(axis, 0) for of in of_stages)
            for axis in AXES
            if any(axis in of for of in of_stages)
        }


def _total(terms: Iterable[StepTerm]) -> Exact:
    return exact(sum((Fraction(term.sent_bytes) for term in terms), Fraction(0)))
