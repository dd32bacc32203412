"""Part ``drift``: online codebooks while the text turns from one domain into another.

b sequences of S tokens. Only codebooks move (their EMA, revival included); all other weights stay.
Beside them stand the same codebooks held still, on the same text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import torch

from vqmoe_megatron.analysis.observation import Observation, code_assigners, observe
from vqmoe_megatron.analysis.part import Findings, Part, Subject, applying, reasons
from vqmoe_megatron.analysis.parts.plots import draw_lines, mean, name_lines
from vqmoe_megatron.analysis.settings import Settings
from vqmoe_megatron.analysis.text import Text
from vqmoe_megatron.analysis.training import move_codebooks
from vqmoe_megatron.analysis.usage import choice_counts, usage_of
from vqmoe_megatron.moe.code_assigner import CodeAssigner
from vqmoe_megatron.study.report.page import Section, Table, drawn_section
from vqmoe_megatron.study.report.plot_style import panels
from vqmoe_megatron.tasks.task import Batch

PLOT = "drift.png"
NUM_PROBE_BATCHES = 2  # held out, at every step that is looked at
ONLINE, HELD = "moving", "held still"
FIGURES = ("changed", "perplexity", "error", "loss")


def measure(subject: Subject) -> Findings:
    """What moving codebooks do, step by step; the model is put back afterwards."""
    model, settings = subject.model, subject.settings
    assigners = _assigners(subject)
    if not assigners:
        return {"reason": "no codebook, so none can follow a drift"}
    still = [a for a in assigners if a.vq.codebook_update != "ema"]
    if still:
        return {
            "reason": f"vq.codebook_update={still[0].vq.codebook_update}: its codes follow their "
            "gradient or anchors, and only the EMA moves codes by themselves"
        }
    if any(bool(a.codebook.is_frozen) for a in assigners):
        return {"reason": "its codebooks are frozen (vq.freeze_codebook, vq.freeze_after_steps)"}
    looked_at = [n for n in range(settings.drift_steps + 1) if n % 3 == 0] or [0]
    if looked_at[-1] != settings.drift_steps:
        looked_at.append(settings.drift_steps)
    held = {n: _probe(subject, n) for n in looked_at}
    rows = [_row(HELD, n, found, found) for n, found in held.items()]
    start = model.at_start()
    stream = zip(_endless(subject.train), _endless(subject.domain_train), strict=False)
    try:
        rows.append(_row(ONLINE, 0, held[0], held[0]))
        for number in range(1, settings.drift_steps + 1):
            move_codebooks(model, mixed(*next(stream), _share(settings, number)))
            if number in held:
                rows.append(_row(ONLINE, number, _probe(subject, number), held[number]))
    finally:
        model.go_back(start)
    return {"rows": rows}


def mixed(first: Batch, second: Batch, share: float) -> Batch:
    """A batch whose last ``share`` of sequences, rounded, are those of ``second``."""
    num_rows = min(len(first["tokens"]), len(second["tokens"]))
    num_second = round(share * num_rows)
    return {
        name: torch.cat([first[name][: num_rows - num_second], second[name][:num_second]])
        for name in first
    }


def _share(settings: Settings, number: int) -> float:
    """Of the new domain at step ``number``: from nothing to everything in equal steps."""
    return number / max(1, settings.drift_steps)


def _endless(text: Text) -> Iterator[Batch]:
    return itertools.chain.from_iterable(text.batches() for _ in itertools.count())


def _assigners(subject: Subject) -> list[CodeAssigner]:
    paths = [path for layer in subject.model.layers for path in layer.paths]
    return [assigner for path in paths for assigner in code_assigners(path).values()]


def _probe(subject: Subject, number: int) -> Observation:
    """Held-out text of both, mixed as step ``number`` is."""
    share = _share(subject.settings, number)
    pairs = zip(subject.text.batches(), subject.domain.batches(), strict=False)
    chosen = itertools.islice(pairs, NUM_PROBE_BATCHES)
    return observe(subject.model, [mixed(*pair, share) for pair in chosen])


def _row(codebooks: str, step: int, found: Observation, held: Observation) -> Findings:
    of_codes = {key: c for key, c in found.choices.items() if c.is_code}
    usages = [usage_of(choice_counts(c.ids, c.num_ids)) for c in of_codes.values()]
    changed = [
        float((c.ids != held.choices[key].ids).double().mean()) for key, c in of_codes.items()
    ]
    return {
        "codebooks": codebooks,
        "step": step,
        "changed": mean(changed),
        "perplexity": mean([usage.perplexity for usage in usages]),
        "dead": mean([float(usage.num_dead) for usage in usages]),
        "error": mean(list(found.errors.values())),
        "loss": found.loss,
    }


def section(findings: Mapping[str, Findings], settings: Settings) -> Section:
    """Four panels over steps; two rows per model."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {figure: {} for figure in FIGURES}
    cells = []
    for name, found in applying(findings).items():
        for codebooks in (HELD, ONLINE):
            rows = [row for row in found["rows"] if row["codebooks"] == codebooks]
            for figure in FIGURES:
                points = [(row["step"], row[figure]) for row in rows]
                lines[figure][f"{name}: {codebooks}"] = points
            last = rows[-1]
            cells.append(
                [name, codebooks, str(last["step"]), f"{last['changed']:.3f}"]
                + [f"{rows[0]['perplexity']:.1f} to {last['perplexity']:.1f}"]
                + [f"{last['dead']:.1f}", f"{rows[0]['error']:.4f} to {last['error']:.4f}"]
                + [f"{rows[0]['loss']:.4f} to {last['loss']:.4f}"]
            )
    drawn = "no model has an online codebook"
    if cells:
        drawn, axes = panels(4)
        names = ("codes that changed", "code perplexity", "code error", "loss (nats/token)")
        for axis, figure, y_name in zip(axes, FIGURES, names, strict=True):
            draw_lines(axis, lines[figure], "step", y_name)
        name_lines(drawn, axes, 2)
    texts = [
        *reasons(findings),
        f"Protocol: over {settings.drift_steps} steps the share of sequences from the new domain "
        "rises from 0 to 1. In every step one batch of training text moves the codebooks by their "
        "EMA (with revival of dead codes); all other weights stay. Every third step held-out text "
        "of the same mixture is looked at, with the moving codebooks and with those of the start.",
    ]
    headings = ["model", "codebooks", "step", "codes changed", "perplexity", "dead", "code error"]
    table = Table(
        [*headings, "loss"],
        cells,
        "Means over codebooks. Codes changed: the share of tokens with another code than the held "
        "codebook gives them. Code error: |x - v|^2 / |x|^2, what the commitment loss pulls at.",
    )
    caption = "Codebooks under drift: moving by their EMA, and held still, on the same text."
    tables = [table] if cells else []
    return drawn_section("Drift", [(PLOT, drawn, caption)], texts, tables)


DRIFT = Part("drift", measure, section)
