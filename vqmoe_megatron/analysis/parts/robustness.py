"""Part ``robustness``: what corrupted tokens, noise and another domain add to the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from vqmoe_megatron.analysis.observation import observe
from vqmoe_megatron.analysis.part import Findings, Part, Subject, applying, reasons
from vqmoe_megatron.analysis.parts.plots import draw_lines, name_lines
from vqmoe_megatron.analysis.perturbation import (
    PAPER_CLAIM,
    add_noise,
    added_loss,
    area_under_curve,
    corrupt_tokens,
    reduction,
)
from vqmoe_megatron.analysis.settings import Settings
from vqmoe_megatron.study.report.page import Section, Table, drawn_section
from vqmoe_megatron.study.report.plot_style import panels

PLOT = "robustness.png"
TOKENS, NOISE, DOMAIN = "token corruption", "embedding noise", "domain shift"


def measure(subject: Subject) -> Findings:
    """Loss at every level of every disturbance; of the domain where one is given."""
    settings, clean = subject.settings, subject.seen.loss
    curves = {TOKENS: [clean], NOISE: [clean]}
    for rate in settings.corruption_rates[1:]:
        change = partial(
            corrupt_tokens,
            rate=rate,
            vocab_size=subject.text.corpus.vocab_size,
            generator=settings.generator("corrupt"),
        )
        found = observe(subject.model, subject.text.batches(), change_tokens=change)
        curves[TOKENS].append(found.loss)
    for size in settings.noise_sizes[1:]:
        change = partial(add_noise, size=size, generator=settings.generator("noise"))
        found = observe(subject.model, subject.text.batches(), change_embedding=change)
        curves[NOISE].append(found.loss)
    domain = None
    if subject.domain is not None:
        domain = observe(subject.model, subject.domain.batches()).loss
    levels = {TOKENS: settings.corruption_rates, NOISE: settings.noise_sizes}
    return {
        "clean": clean,
        "levels": {name: list(values) for name, values in levels.items()},
        "losses": curves,
        "area": {name: area_under_curve(levels[name], curves[name]) for name in curves},
        "added": {name: added_loss(levels[name], curves[name]) for name in curves},
        "domain": domain,
    }


def section(findings: Mapping[str, Findings], settings: Settings) -> Section:
    """Curves of all models; the first model is what the others are compared with."""
    models = applying(findings)
    lines: dict[str, dict[str, Sequence[tuple[float, float]]]] = {TOKENS: {}, NOISE: {}}
    cells = []
    first = next(iter(models.values()), None)
    for name, found in models.items():
        for what in (TOKENS, NOISE):
            levels, losses = found["levels"][what], found["losses"][what]
            lines[what][name] = list(zip(levels, losses, strict=True))
            cells.append(
                [name, what, f"{found['clean']:.4f}", f"{losses[-1]:.4f} at {levels[-1]:g}"]
                + [f"{found['area'][what]:.4f}", f"{found['added'][what]:.4f}"]
                + [_compared(found["added"][what], first["added"][what], found is first)]
            )
        if found["domain"] is not None:
            added, reference = (m["domain"] - m["clean"] for m in (found, first))
            cells.append(
                [name, DOMAIN, f"{found['clean']:.4f}", f"{found['domain']:.4f}", ""]
                + [f"{added:.4f}", _compared(added, reference, found is first)]
            )
    drawn = "no model was measured"
    if cells:
        drawn, axes = panels(2)
        draw_lines(axes[0], lines[TOKENS], "share of corrupted tokens", "loss (nats/token)")
        draw_lines(axes[1], lines[NOISE], "size of the embedding noise", "loss (nats/token)")
        name_lines(drawn, axes, 3)
    texts = [*reasons(findings), *_protocol(settings, models)]
    headings = [
        "model",
        "disturbance",
        "clean",
        "disturbed",
        "area",
        "added",
        "less than the first",
    ]
    table = Table(
        headings,
        cells,
        "Losses in nats per token. Area: the mean over the range of levels, by trapezoids. Added: "
        "area less the clean loss; of the domain its loss less the clean one. Less than the first: "
        "the share by which a model's added loss is below that of the first model of this page, "
        f"the figure to put beside the paper's {PAPER_CLAIM:.0%}.",
    )
    caption = (
        "Loss under disturbance. Left: tokens replaced by others at random; right: normal noise on "
        "the embedding. What is to be predicted stays as it was."
    )
    tables = [table] if cells else []
    return drawn_section("Robustness", [(PLOT, drawn, caption)], texts, tables)


def _compared(added: float, reference: float, is_first: bool) -> str:
    return "the first" if is_first else f"{reduction(added, reference):+.1%}"


def _protocol(settings: Settings, models: Mapping[str, Findings]) -> list[str]:
    rates = ", ".join(f"{rate:g}" for rate in settings.corruption_rates)
    sizes = ", ".join(f"{size:g}" for size in settings.noise_sizes)
    texts = [
        f"Protocol: {settings.num_tokens:,} tokens of split {settings.split}, windows evenly "
        f"spread, seed {settings.seed}. Every token is replaced with probability {rates} by "
        "another one, drawn evenly from the vocabulary; or its embedding gets normal noise of "
        f"relative length {sizes}. All models meet the same draws.",
        f"The paper claims {PAPER_CLAIM:.0%} better robustness, and its protocol is not public; "
        "this is ours. A model that reads its context well has more to lose by a broken one, so "
        "compare added losses of models with equal clean losses. One seed has no interval.",
    ]
    if len(models) == 1:
        texts.append("One model was given, so there is no difference to put beside the claim.")
    if any(found["domain"] is None for found in models.values()):
        texts.append("Domain shift is left out: --domain PATH names another prepared corpus.")
    return texts


ROBUSTNESS = Part("robustness", measure, section)
