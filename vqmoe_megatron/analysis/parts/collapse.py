"""Part ``collapse``: do layers, experts and gradients use the directions that they have?

S, b of one microbatch, T = S * b tokens, H hidden size, N experts, K codes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch

from vqmoe_megatron.analysis.collapse import (
    effective_rank,
    input_gradients,
    mean_cosine,
    num_different_experts,
    rank,
    singular_values,
)
from vqmoe_megatron.analysis.observation import code_assigners, losses_of, watched
from vqmoe_megatron.analysis.part import Findings, Part, Subject, applying, reasons
from vqmoe_megatron.analysis.parts import ranks_by_codes
from vqmoe_megatron.analysis.parts.plots import draw_lines, layer_axis, name_lines
from vqmoe_megatron.analysis.settings import Settings
from vqmoe_megatron.moe.expert_engine import ExpertEngine, Result, Work
from vqmoe_megatron.moe.layer import VQMoELayer
from vqmoe_megatron.study.report.page import Section, Table, drawn_section
from vqmoe_megatron.study.report.plot_style import panels

PLOT = "collapse.png"
MAX_INPUTS = 128  # that every expert is given


class HeldOutputs:
    """In the place of a layer's expert engine: outputs are constants to whoever differentiates."""

    def __init__(self, engine: ExpertEngine) -> None:
        self.engine = engine

    def run(self, works: Sequence[Work]) -> list[Result]:
        """As :meth:`ExpertEngine.run`, without gradients."""
        return [
            Result([rows.detach() for rows in r.rows], [rows.detach() for rows in r.residents])
            for r in self.engine.run(works)
        ]


@contextlib.contextmanager
def held_outputs(layer: VQMoELayer) -> Iterator[None]:
    """While entered, gradients of ``layer`` pass through its router, gate and codes only."""
    engine = layer.engine
    layer.engine = HeldOutputs(engine)
    try:
        yield
    finally:
        layer.engine = engine


def measure(subject: Subject) -> Findings:
    """Every layer on one microbatch of the undisturbed text."""
    rows: list[Findings] = []

    def see(layer: VQMoELayer, hidden_states: torch.Tensor) -> None:
        rows.append(layer_figures(layer, hidden_states, subject.settings))

    batch = next(subject.text.batches())
    with torch.no_grad(), watched(subject.model, see):
        losses_of(subject.model, batch["tokens"], batch)
    return {"rows": rows, "num_tokens": batch["tokens"].numel()}


def layer_figures(layer: VQMoELayer, hidden_states: torch.Tensor, settings: Settings) -> Findings:
    """All figures of one layer on ``[S, b, H]``; called within the model's forward pass."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])

    def function(rows: torch.Tensor) -> torch.Tensor:
        return layer.forward(rows.view_as(hidden_states))[0].reshape(x.shape)

    num_experts, hidden = layer.config.num_moe_experts, x.shape[1]
    inputs = x[:: max(1, x.shape[0] // MAX_INPUTS)][:MAX_INPUTS]
    outputs = expert_outputs(layer, inputs)
    probes = settings.num_probes, settings.generator("probes")
    whole = singular_values(input_gradients(function, x, *probes))
    with held_outputs(layer):
        held = singular_values(input_gradients(function, x, *probes))
    num_codes = sum(
        assigner.codebook.num_codes * assigner.codebook.num_slices
        for path in layer.paths
        for name, assigner in code_assigners(path).items()
        if name == "codes"
    )
    weights = [p.flatten(1) for p in layer.experts.parameters() if p.dim() == 3]
    return {
        "layer": layer.layer_number,
        "hidden_size": hidden,
        "num_experts": num_experts,
        "num_codes": num_codes,
        "input_rank": effective_rank(singular_values(x, center=True)),
        "output_rank": effective_rank(singular_values(function(x), center=True)),
        "expert_output_rank": effective_rank(singular_values(outputs.flatten(0, 1), center=True)),
        "different_experts": num_different_experts(outputs),
        "output_cosine": _number(mean_cosine(outputs)),
        "weight_cosine": _number(mean_cosine(torch.cat(weights, 1))) if weights else None,
        "gradient_rank": rank(whole),
        "gradient_effective_rank": effective_rank(whole),
        "routing_rank": rank(held),
        "routing_effective_rank": effective_rank(held),
        "claim": num_experts + (num_codes + 2 if num_codes else 0),
    }


def expert_outputs(layer: VQMoELayer, inputs: torch.Tensor) -> torch.Tensor:
    """What all N experts make of the same inputs ``[M, H]``: ``[N, M, H]``."""
    num_experts, num_inputs = layer.config.num_moe_experts, inputs.shape[0]
    counts = torch.full((num_experts,), num_inputs, dtype=torch.int64, device=inputs.device)
    rows = inputs.repeat(num_experts, 1)
    return layer.engine.evaluate(rows, counts, num_inputs).view(num_experts, num_inputs, -1)


def _number(value: float) -> float | None:
    return value if value == value else None


def section(findings: Mapping[str, Findings], settings: Settings) -> Section:
    """Ranks over layers; one row per model and layer."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {"out": {}, "experts": {}, "grad": {}}
    cells = []
    for name, found in applying(findings).items():
        for row in found["rows"]:
            layer, hidden = row["layer"], row["hidden_size"]
            lines["out"].setdefault(name, []).append((layer, row["output_rank"] / hidden))
            experts = row["different_experts"] / row["num_experts"]
            lines["experts"].setdefault(name, []).append((layer, experts))
            lines["grad"].setdefault(name, []).append((layer, row["gradient_effective_rank"]))
            shown = (f"{row[key]:.1f}" for key in ("input_rank", "output_rank"))
            cosines = ("output_cosine", "weight_cosine")
            cells.append(
                [name, str(layer), str(hidden), *shown, f"{row['expert_output_rank']:.1f}"]
                + [f"{row['different_experts']:.2f} of {row['num_experts']}"]
                + ["" if row[key] is None else f"{row[key]:.3f}" for key in cosines]
                + [f"{row['gradient_rank']} ({row['gradient_effective_rank']:.1f})"]
                + [f"{row['routing_rank']} ({row['routing_effective_rank']:.1f})"]
                + [_claim(row)]
            )
    drawn = "no model was measured"
    if cells:
        drawn, axes = panels(3)
        draw_lines(axes[0], lines["out"], "layer", "effective rank of outputs / H")
        draw_lines(axes[1], lines["experts"], "layer", "different experts / N")
        draw_lines(axes[2], lines["grad"], "layer", "effective rank of gradients")
        for axis in axes:
            layer_axis(axis)
            axis.set_ylim(bottom=0)
        name_lines(drawn, axes, 3)
    texts = [
        *reasons(findings),
        "The effective rank is exp of the entropy of singular values: n for n equal directions, 1 "
        "for one. Of inputs and outputs it is taken around their mean. Different experts: the "
        "effective rank of the N experts' outputs to the same inputs, 1 for copies of one expert.",
        "Gradients: rows v J of every token of one microbatch for random directions v (one "
        "vector-Jacobian product serves all tokens). Rank counts singular values above 1e-4 of the "
        "largest, the effective rank stands in brackets. Routing alone: experts' outputs held "
        "constant, so that router, gate, and the codes' straight-through gradient remain. The "
        "paper claims at most N directions of a sparse mixture beside the experts' own, and "
        "N + K + 2 with codes; none can be more than H.",
    ]
    headings = ["model", "layer", "H", "input", "output", "experts' outputs", "different experts"]
    headings += ["cosine outputs", "cosine weights", "gradient rank", "routing alone", "claim"]
    caption = (
        "Effective ranks by layer. Left: of the layer's outputs; middle: of its experts; right: of "
        "the gradients that reach its inputs."
    )
    tables = [Table(headings, cells)] if cells else []
    drawings = [(PLOT, drawn, caption)]
    groups = ranks_by_codes.grouped(applying(findings))
    if ranks_by_codes.differ_in_codes(groups):
        drawings.append((ranks_by_codes.PLOT, ranks_by_codes.drawn(groups), ranks_by_codes.CAPTION))
        tables.insert(0, ranks_by_codes.table(groups))
    return drawn_section("Representation collapse", drawings, texts, tables)


def _claim(row: Findings) -> str:
    claim, hidden = row["claim"], row["hidden_size"]
    formula = "N + K + 2" if row["num_codes"] else "N"
    return f"{claim} ({formula})" + (f", at most H = {hidden}" if claim > hidden else "")


COLLAPSE = Part("collapse", measure, section)
