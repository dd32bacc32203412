"""What one VQMoE layer costs one rank, and whether code space or token dispatch is cheaper.

T local tokens, K codes per slice, N experts, F expert hidden size, m matrices per expert.

``layer_cost`` sums up :mod:`wire_cost`, :mod:`flop_cost` and :mod:`memory_cost` of one execution.
``compare`` lays the two executions side by side, each quantity with its break-even: the most codes
for which code space costs no more than tokens. It is found from the formulas by bisection, because
code space grows with K in everything while tokens do not (but for the search, which is common).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd

from vqmoe_megatron.plan.exact import Exact
from vqmoe_megatron.plan.flop_cost import FlopCost, expert_forward_flops, flop_cost, search_flops
from vqmoe_megatron.plan.layer_shape import LayerShape
from vqmoe_megatron.plan.memory_cost import (
    LayerParameters,
    SavedBytes,
    layer_parameters,
    saved_bytes,
)
from vqmoe_megatron.plan.wire_cost import RowTraffic, WireCost, wire_cost

MOST_CODES = 1 << 40  # a break-even beyond it is none


@dataclass(frozen=True)
class LayerCost:
    """Everything one layer costs one rank."""

    num_microbatches: int
    wire: WireCost
    flops: FlopCost
    saved: SavedBytes
    parameters: LayerParameters

    @property
    def wire_bytes_per_step(self) -> Exact:
        """Sent by this rank in an optimizer step."""
        return self.wire.step_bytes(self.num_microbatches)

    @property
    def flops_per_step(self) -> int:
        """Operations of this rank in an optimizer step."""
        return self.flops.step_flops(self.num_microbatches)


@dataclass(frozen=True)
class Comparison:
    """One quantity under both executions."""

    quantity: str  # with its unit, a key of QUANTITIES
    tokens: Exact
    code_space: Exact
    break_even_num_codes: int | None  # 0: code space costs more at any K; None: it never does

    @property
    def cheaper(self) -> str:
        """``tokens``, ``code_space`` or ``equal``."""
        if self.tokens == self.code_space:
            return "equal"
        return "tokens" if self.tokens < self.code_space else "code_space"

    @property
    def ratio(self) -> float | None:
        """code_space / tokens; None where tokens cost nothing."""
        return float(self.code_space / self.tokens) if self.tokens else None


QUANTITIES: dict[str, Callable[[LayerCost], Exact]] = {
    "forward_flops": lambda cost: cost.flops.forward_flops,
    "backward_flops": lambda cost: cost.flops.backward_flops,
    "flops_per_step": lambda cost: cost.flops_per_step,
    "forward_wire_bytes": lambda cost: cost.wire.forward_bytes,
    "backward_wire_bytes": lambda cost: cost.wire.backward_bytes,
    "wire_bytes": lambda cost: cost.wire.microbatch_bytes,
    "wire_bytes_per_step": lambda cost: cost.wire_bytes_per_step,
    "saved_bytes": lambda cost: cost.saved.saved_bytes,
    "peak_saved_bytes": lambda cost: cost.saved.peak_bytes,
}


def layer_cost(
    layer: LayerShape,
    traffic: RowTraffic | None = None,
    straight_through_traffic: RowTraffic | None = None,
) -> LayerCost:
    """Return all costs of one layer; traffic as in :func:`wire_cost`, balanced when None."""
    return LayerCost(
        num_microbatches=layer.num_microbatches,
        wire=wire_cost(layer, traffic, straight_through_traffic),
        flops=flop_cost(layer),
        saved=saved_bytes(layer),
        parameters=layer_parameters(layer),
    )


def compare(layer: LayerShape) -> tuple[Comparison, ...]:
    """Lay both executions of one layer side by side, whichever of them ``layer`` names.

    ``layer.table_per_step`` holds for code space. Loads are balanced.

    Raises:
        ValueError: when the layer has no code space (its path or its expert input forbids it).
    """
    by_tokens, in_code_space = (layer_cost(shape) for shape in _executions(layer))
    return tuple(
        Comparison(
            quantity,
            measure(by_tokens),
            measure(in_code_space),
            break_even_num_codes(layer, quantity),
        )
        for quantity, measure in QUANTITIES.items()
    )


def break_even_num_codes(layer: LayerShape, quantity: str) -> int | None:
    """Return the most codes K for which code space costs no more than tokens.

    0 when it costs more at any K that the code map allows, None when it costs no more at every K.

    Raises:
        ValueError: for a quantity that is not in ``QUANTITIES``, or without a code space.
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity {quantity!r}: choose one of {', '.join(QUANTITIES)}")
    measure = QUANTITIES[quantity]
    unit = 1  # codes are added by so many
    if layer.code_map != "mod":
        unit = layer.num_moe_experts // gcd(layer.num_moe_experts, layer.num_code_slices)

    def is_no_more(num_units: int) -> bool:
        shapes = _executions(replace(layer, num_codes=num_units * unit))
        by_tokens, in_code_space = (measure(layer_cost(shape)) for shape in shapes)
        return in_code_space <= by_tokens

    most = _largest(is_no_more, MOST_CODES)
    return None if most is None else most * unit


def search_break_even_num_codes(layer: LayerShape) -> int | None:
    """Return the most codes K for which finding the nearest one takes no more operations than what
    it replaces: a router over N experts and one row through an expert, forward. About N + m F;
    for low_dim, whose D columns of H cost a projection, (N + m F) H / D - H.

    None for path=continuous, which searches nothing.
    """
    router = 2 * layer.hidden_size * layer.num_moe_experts
    replaced = layer.num_local_tokens * (router + expert_forward_flops(layer))

    def is_no_more(num_codes: int) -> bool:
        shape = replace(layer, num_codes=num_codes, code_map="mod")
        return search_flops(shape) <= replaced

    return _largest(is_no_more, MOST_CODES)


def _executions(layer: LayerShape) -> tuple[LayerShape, LayerShape]:
    by_tokens = replace(layer, execution="tokens", table_per_step=False)
    return by_tokens, replace(layer, execution="code_space")


def _largest(holds: Callable[[int], bool], limit: int) -> int | None:
    """The largest number from 1 for which ``holds``, which stays false once it is: 0 when it never
    does, None when it still does at ``limit``."""
    low, high = 0, 1  # holds(low) or low == 0
    while holds(high):
        if high >= limit:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low
