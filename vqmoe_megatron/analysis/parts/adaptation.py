"""Part ``adaptation``: how fast a model learns a new domain from a few batches."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

from vqmoe_megatron.analysis.observation import observe
from vqmoe_megatron.analysis.part import Findings, Part, Subject, applying, reasons
from vqmoe_megatron.analysis.parts.plots import draw_lines, name_lines
from vqmoe_megatron.analysis.settings import Settings
from vqmoe_megatron.analysis.text import MICRO_BATCH_SIZES
from vqmoe_megatron.analysis.training import train
from vqmoe_megatron.study.report.page import Section, Table, drawn_section
from vqmoe_megatron.study.report.plot_style import panels

PLOT = "adaptation.png"
LEVELS = (1, 2, 4, 8, 16, 32, 64)  # batches after which the held-out loss is taken


def measure(subject: Subject) -> Findings:
    """Held-out loss after so many examples of the domain; the model is put back afterwards."""
    settings, model, text = subject.settings, subject.model, subject.domain_train
    start = model.at_start()
    # Of the training text as many windows as that many batches need, whatever a pass reads.
    num_tokens = settings.adapt_batches * MICRO_BATCH_SIZES[0] * text.seq_length
    text = replace(text, num_tokens=num_tokens)
    batches = list(itertools.islice(text.batches(), settings.adapt_batches))
    size = text.windows.micro_batch_size
    points = [[0, observe(model, subject.domain.batches()).loss]]

    def after(number: int) -> None:
        if number in LEVELS or number == len(batches):
            points.append([number * size, observe(model, subject.domain.batches()).loss])

    try:
        train(model, batches, settings.adapt_lr, after)
        source = observe(model, subject.text.batches()).loss
    finally:
        model.go_back(start)
    return {
        "points": points,
        "num_batches": len(batches),
        "seq_length": subject.domain.seq_length,
        "source_before": subject.seen.loss,
        "source_after": source,
    }


def section(findings: Mapping[str, Findings], settings: Settings) -> Section:
    """One curve and one row per model."""
    models = applying(findings)
    lines = {name: found["points"] for name, found in models.items()}
    cells = []
    for name, found in models.items():
        (_, before), (num_examples, after) = found["points"][0], found["points"][-1]
        forgotten = found["source_after"] - found["source_before"]
        cells.append(
            [name, str(num_examples), f"{num_examples * found['seq_length']:,}"]
            + [f"{before:.4f}", f"{after:.4f}", f"{before - after:+.4f}", f"{forgotten:+.4f}"]
        )
    drawn = "no model was trained"
    if cells:
        drawn, (axis,) = panels(1)
        draw_lines(axis, lines, "examples of the domain", "held-out loss (nats/token)")
        name_lines(drawn, [axis], 2)
    texts = [
        *reasons(findings),
        *(
            f"{name}: the domain's training text holds {found['num_batches']} batches only."
            for name, found in models.items()
            if found["num_batches"] < settings.adapt_batches
        ),
        f"Protocol: {settings.adapt_batches} batches of the domain's training text, each one Adam "
        f"update of all weights at a fixed rate of {settings.adapt_lr:g}, gradients clipped at 1, "
        "codebooks by their own rules; the same text in the same order for every model. Nothing is "
        "written: the model is put back. One order has no interval.",
    ]
    headings = ["model", "examples", "tokens", "before", "after", "gained", "lost on its own text"]
    caption = "Held-out loss of the new domain by the number of examples that were trained on."
    tables = [Table(headings, cells, "Losses in nats per token.")] if cells else []
    return drawn_section("Rapid adaptation", [(PLOT, drawn, caption)], texts, tables)


ADAPTATION = Part("adaptation", measure, section)
