"""The arms by their letters: who computes what, which of them must agree, where each makes sense.

Arms of one ``function`` have equal outputs and equal gradients of every parameter they share. Those
that also agree in ``token_gradient`` give the tokens equal gradients:

    exact   through the layer, straight through the code where experts see codes
    group   each code's mean gradient (vq.straight_through=group)
    none    only through what is not discrete

A forward pass does not depend on it, nor on when a table is differentiated, so arms that differ
in nothing else are timed forward only once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vqmoe_megatron.bench.cases import PASSES, LayerCase, check_choice
from vqmoe_megatron.config.vq import VQConfig
from vqmoe_megatron.plan.shape import LayerShape

FORWARD, FORWARD_BACKWARD = PASSES
NUM_PRODUCT_SLICES = 8  # of arm P8
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class ArmSpec:
    """One way of computing a layer."""

    text: str
    kind: str  # megatron | released | vqmoe
    function: str
    token_gradient: str = "exact"
    topk: int = 1  # of the continuous path
    uses_own_experts: bool = True  # the package's grouped experts, in Megatron's layer too
    vq: dict[str, Any] = field(default_factory=dict)  # fields of VQConfig
    passes: tuple[str, ...] = PASSES
    num_microbatches: int = 1  # of a step; times and bytes are per microbatch

    @property
    def title(self) -> str:
        """What the arm is, for a reader."""
        if self.num_microbatches == 1:
            return self.text
        return f"{self.text}, {self.num_microbatches} microbatches"


def _tokens(**vq: Any) -> dict[str, Any]:
    return {"path": "discrete", "execution": "tokens", **vq}


def _code_space(**vq: Any) -> dict[str, Any]:
    return {"path": "discrete", "execution": "code_space", "straight_through": "none", **vq}


BACKWARD_ONLY = (FORWARD_BACKWARD,)
PRODUCT = {"quantizer": "product", "num_code_slices": NUM_PRODUCT_SLICES}

ARMS: dict[str, ArmSpec] = {
    "A": ArmSpec("Megatron MoELayer, top-1", "megatron", "top1", uses_own_experts=False),
    "A1": ArmSpec("Megatron MoELayer, top-1, our grouped experts", "megatron", "top1"),
    "A2": ArmSpec("Megatron MoELayer, top-2", "megatron", "top2", topk=2, uses_own_experts=False),
    "D0": ArmSpec("ours, continuous path alone", "vqmoe", "top1", vq={"path": "continuous"}),
    "B": ArmSpec("released formulation, codes", "released", "discrete", vq=_tokens()),
    "BH": ArmSpec(
        "released formulation, blend", "released", "blend", vq=_tokens(expert_input="blend")
    ),
    "B2": ArmSpec(
        "released formulation, both paths", "released", "dual", vq=_tokens(path="dual")
    ),
    "C": ArmSpec("token dispatch by codes", "vqmoe", "discrete", vq=_tokens()),
    "H": ArmSpec("token dispatch, blend", "vqmoe", "blend", vq=_tokens(expert_input="blend")),
    "D": ArmSpec("both paths, merged token dispatch", "vqmoe", "dual", vq=_tokens(path="dual")),
    "E": ArmSpec("code space", "vqmoe", "discrete", "none", vq=_code_space()),
    "F": ArmSpec(
        "code space, straight-through to tokens", "vqmoe", "discrete", "exact",
        vq=_code_space(straight_through="token"), passes=BACKWARD_ONLY,
    ),
    "F2": ArmSpec(
        "code space, straight-through by groups", "vqmoe", "discrete", "group",
        vq=_code_space(straight_through="group"), passes=BACKWARD_ONLY,
    ),
    "G1": ArmSpec(
        "table per step", "vqmoe", "discrete", "none",
        vq=_code_space(table_per_step=True), passes=BACKWARD_ONLY,
    ),
    "G8": ArmSpec(
        "table per step", "vqmoe", "discrete", "none",
        vq=_code_space(table_per_step=True), passes=BACKWARD_ONLY, num_microbatches=8,
    ),
    "G0": ArmSpec(
        "kept table, evaluation", "vqmoe", "discrete", "none",
        vq=_code_space(table_per_step=True), passes=(FORWARD,),
    ),
    "E2": ArmSpec(
        "both paths, code space", "vqmoe", "dual", "none", vq=_code_space(path="dual")
    ),
    "F3": ArmSpec(
        "both paths, code space, straight-through to tokens", "vqmoe", "dual", "exact",
        vq=_code_space(path="dual", straight_through="token"), passes=BACKWARD_ONLY,
    ),
    "G2": ArmSpec(
        "both paths, table per step", "vqmoe", "dual", "none",
        vq=_code_space(path="dual", table_per_step=True),
        passes=BACKWARD_ONLY, num_microbatches=8,
    ),
    "P8": ArmSpec(
        f"product codes, {NUM_PRODUCT_SLICES} slices, code space", "vqmoe", "product", "none",
        vq=_code_space(**PRODUCT),
    ),
}  # fmt: skip


def choose_arms(letters: Sequence[str], is_for: str, hidden_size: int) -> dict[str, ArmSpec]:
    """Return the arms of these letters, all when there are none, that do the pass ``is_for``.

    Raises:
        ValueError: for an unknown letter, or a hidden size that an arm's slices do not divide.
    """
    for letter in letters:
        check_choice("--arms", letter, list(ARMS))
    chosen = {
        letter: spec
        for letter, spec in ARMS.items()
        if is_for in spec.passes and (not letters or letter in letters)
    }
    for letter, spec in chosen.items():
        slices = spec.vq.get("num_code_slices", 1)
        if hidden_size % slices:
            raise ValueError(
                f"arm {letter} cuts the hidden vector in {slices} slices: hidden_size % {slices} "
                f"!= 0: {hidden_size} % {slices} = {hidden_size % slices}"
            )
    return chosen


def layer_shape(case: LayerCase, spec: ArmSpec, sizes: Mapping[str, int]) -> LayerShape:
    """Return an arm of kind ``vqmoe`` in the words of the cost model, which predicts its bytes.

    Args:
        case: sizes.
        spec: the arm.
        sizes: the layout's parallel sizes; those left out are 1.
    """
    return LayerShape(
        vq=VQConfig(num_codes=case.num_codes, norm=case.norm, **spec.vq),
        num_local_tokens=case.num_tokens,
        hidden_size=case.hidden_size,
        moe_ffn_hidden_size=case.ffn_hidden_size,
        num_moe_experts=case.num_experts,
        moe_router_topk=spec.topk,
        bytes_per_element=ELEMENT_BYTES[case.dtype],
        expert_model_parallel_size=sizes.get("expert_model_parallel_size", 1),
        expert_tensor_parallel_size=sizes.get("expert_tensor_parallel_size", 1),
        tensor_model_parallel_size=sizes.get("tensor_model_parallel_size", 1),
        num_microbatches=spec.num_microbatches,
    )
