"""``vqmoe bench wire``: bytes that one layer sends, counted on real gloo ranks, and predicted.

T tokens per rank, P expert-parallel ranks, E expert-tensor ranks. Bytes only: how long gloo takes
says nothing about a network. Every collective of every rank is compared with the terms of
``plan/wire.py``, which are told where the rows of all ranks go; they must be equal to the
byte, collective by collective. Megatron's own layer (A, A2) is counted beside ours; the formulas
are not about it.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from vqmoe_megatron.bench.arm_table import ARMS, ArmSpec, layer_shape
from vqmoe_megatron.bench.cases import PASSES, LayerCase, RanksFailed, check_choice
from vqmoe_megatron.bench.progress import Progress
from vqmoe_megatron.bench.wire_rank import JOB_FILE, result_file, step_spec
from vqmoe_megatron.launch.local_ranks import run_local_ranks
from vqmoe_megatron.plan.rules import remainder
from vqmoe_megatron.plan.shape import LayerShape
from vqmoe_megatron.plan.wire import RowTraffic, layer_terms
from vqmoe_megatron.rundir.waiting import told_while_waiting

TP, EP, ETP = (
    f"{name}_parallel_size" for name in ("tensor_model", "expert_model", "expert_tensor")
)
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {  # ranks, parallel sizes
    "ep1": (1, {}),
    "ep2": (2, {EP: 2}),
    "etp2": (2, {ETP: 2}),
    "ep4": (4, {EP: 4}),
    "tp2ep2": (4, {TP: 2, EP: 2}),  # with sequence parallelism
}
WIRE_ARMS = ("A", "A2", "D0", "C", "D", "H", "E", "F", "F2", "E2", "F3", "G8", "G2", "P8")
Findings = list[dict[str, Any]]  # of every rank, as wire_rank.count_arms returns them


def measure_wire(
    case: LayerCase,
    layouts: Sequence[str],
    letters: Sequence[str],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Start local ranks for every world size; one row per layout, arm and pass.

    Args:
        case: sizes; ``num_tokens`` are those of each rank.
        layouts: names of ``LAYOUTS``.
        letters: of ``WIRE_ARMS``; none: all.
        progress: says a line per world.

    Raises:
        ValueError: for unknown names, or experts that the ranks do not divide.
        RanksFailed: when ranks did not finish; they printed why.
    """
    for letter in letters:
        check_choice("--arms", letter, WIRE_ARMS)
    for name in layouts:
        check_choice("--layouts", name, list(LAYOUTS))
        check_layout_fits(case, name)
    chosen = [letter for letter in WIRE_ARMS if not letters or letter in letters]
    rows = []
    for num_ranks in sorted({LAYOUTS[name][0] for name in layouts}):
        names = [name for name in layouts if LAYOUTS[name][0] == num_ranks]
        what = f"local ranks: {num_ranks}, layouts: {', '.join(names)}"
        progress.say(what)
        progress.look(f"{what}: counting")
        with told_while_waiting(f"{what}: counting", progress.show):
            found = _run_world(case, num_ranks, names, chosen)
        for name, findings in found.items():
            rows += wire_rows(case, name, chosen, findings)
    return rows


def check_layout_fits(case: LayerCase, name: str) -> None:
    """Raise ``ValueError`` when the layout does not divide the experts, or cuts them too small."""
    sizes = LAYOUTS[name][1]
    for error in (
        *remainder(
            "num_experts", case.num_experts, "EP", sizes.get(EP, 1), "ranks own equally many"
        ),
        *case.width_errors(sizes.get(ETP, 1)),
    ):
        raise ValueError(f"layout {name}: {error}")


def _run_world(
    case: LayerCase, num_ranks: int, names: Sequence[str], letters: Sequence[str]
) -> dict[str, Findings]:
    with tempfile.TemporaryDirectory(prefix="vqmoe_wire_") as temporary:
        folder = Path(temporary)
        job = {
            "case": dataclasses.asdict(case),
            "layouts": {name: LAYOUTS[name][1] for name in names},
            "arms": list(letters),
        }
        (folder / JOB_FILE).write_text(json.dumps(job))
        ended = run_local_ranks(["bench", "wire-rank", str(folder)], num_ranks)
        if ended.code != 0:
            raise RanksFailed(f"counting on {num_ranks} ranks: {ended.failure}")
        found = [json.loads(result_file(folder, rank).read_text()) for rank in range(num_ranks)]
    return {name: [of_rank[name] for of_rank in found] for name in names}


def wire_rows(
    case: LayerCase, layout: str, letters: Sequence[str], findings: Findings
) -> list[dict[str, Any]]:
    """Return the rows of one layout: counted and predicted bytes of every arm and pass.

    ``wire_bytes`` are per microbatch, of the rank that sends most; ``matches`` is None where
    nothing is predicted.
    """
    sizes = LAYOUTS[layout][1]
    rows = []
    for letter in letters:
        spec = step_spec(ARMS[letter])
        counted = [_counted(of_rank, letter) for of_rank in findings]
        predicted = None
        if spec.kind == "vqmoe":
            shape = layer_shape(case, spec, sizes)
            predicted = [
                _predicted(shape, findings, letter, rank, spec) for rank in range(len(findings))
            ]
        for pass_name in PASSES:
            has_both = pass_name == PASSES[1]
            ours = [_of_pass(terms, has_both) for terms in counted]
            expected = None
            if predicted is not None:
                expected = [_of_pass(terms, has_both) for terms in predicted]
            rows.append(
                {
                    "arm": letter,
                    "text": spec.title,
                    **case.identity,
                    "layout": layout,
                    "num_ranks": len(findings),
                    "expert_model_parallel_size": sizes.get(EP, 1),
                    "expert_tensor_parallel_size": sizes.get(ETP, 1),
                    "tensor_model_parallel_size": sizes.get(TP, 1),
                    "pass": pass_name,
                    "num_microbatches": spec.num_microbatches,
                    **dict.fromkeys(("median_ms", "p10_ms", "p90_ms", "saved_bytes")),
                    "wire_bytes": _largest(ours, spec),
                    "predicted_wire_bytes": None if expected is None else _largest(expected, spec),
                    "matches": None if expected is None else ours == expected,
                    "collectives": _as_table(ours, expected),
                }
            )
    return rows


Term = tuple[bool, str, str, Fraction]  # is_backward, collective, group, bytes
Terms = Counter[Term]


def _counted(of_rank: Mapping[str, Any], letter: str) -> Terms:
    sent = of_rank["arms"][letter]["sent"]
    return Counter((*key, Fraction(over, under)) for *key, over, under in sent)


def _predicted(
    shape: LayerShape, findings: Findings, letter: str, rank: int, spec: ArmSpec
) -> Terms:
    travelling = ["continuous", "discrete"]
    if shape.vq.in_code_space:
        travelling = ["continuous"]
    called = layer_terms(
        shape,
        _traffic(shape, findings, letter, rank, travelling),
        _traffic(shape, findings, letter, rank, ["discrete"]),
    )
    terms: Terms = Counter()
    for term in called:
        if term.sent_bytes:
            key = term.is_backward, term.collective, term.axis, Fraction(term.sent_bytes)
            terms[key] += 1 if term.is_once_per_step else spec.num_microbatches
    return terms


def _traffic(
    shape: LayerShape, findings: Findings, letter: str, rank: int, paths: Sequence[str]
) -> RowTraffic:
    """Rows that one rank moves, from the experts of all ranks' rows."""
    num_ranks = shape.expert_model_parallel_size
    experts_per_rank = shape.num_moe_experts // num_ranks

    def rows_to(source: Mapping[str, Any], owner: int) -> int:
        experts = [expert for path in paths for expert in source["arms"][letter][path]]
        return sum(expert // experts_per_rank == owner for expert in experts)

    replica, place, shard = findings[rank]["place"]
    received: Counter[int] = Counter()  # by shard of this rank's experts
    for other in findings:
        if other["place"][0] == replica:
            received[other["place"][2]] += rows_to(other, place)
    kept = rows_to(findings[rank], place)
    sent = sum(rows_to(findings[rank], owner) for owner in range(num_ranks)) - kept
    return RowTraffic(sent, received[shard] - kept, max(received.values()))


def _of_pass(terms: Terms, has_both: bool) -> Terms:
    return terms if has_both else Counter({t: n for t, n in terms.items() if not t[0]})


def _largest(of_ranks: Sequence[Terms], spec: ArmSpec) -> int | float:
    """Bytes per microbatch of the rank that sends most."""
    sums = [sum(term[3] * times for term, times in terms.items()) for terms in of_ranks]
    return _number(Fraction(max(sums), spec.num_microbatches))


def _number(amount: int | Fraction) -> int | float:
    return int(amount) if amount.denominator == 1 else float(amount)


def _as_table(ours: Sequence[Terms], expected: Sequence[Terms] | None) -> list[dict[str, Any]]:
    """Bytes of a step by collective, group and pass, of every rank."""

    def totals(terms: Terms) -> Counter[tuple[bool, str, str]]:
        found: Counter[tuple[bool, str, str]] = Counter()
        for (*key, num_bytes), times in terms.items():
            found[tuple(key)] += num_bytes * times
        return found

    counted = [totals(terms) for terms in ours]
    predicted = None if expected is None else [totals(terms) for terms in expected]
    keys = {key for of_rank in [*counted, *(predicted or [])] for key in of_rank}
    return [
        {
            "pass": "backward" if key[0] else "forward",
            "collective": key[1],
            "group": key[2],
            "step_bytes_of_ranks": [_number(of[key]) for of in counted],
            "predicted_step_bytes_of_ranks": predicted and [_number(of[key]) for of in predicted],
        }
        for key in sorted(keys)
    ]
