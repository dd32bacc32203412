"""The rules of ``vq.quantizer``: which settings a quantizer has, and what goes with them.

H hidden size, D = ``vq.code_dim``, K = ``vq.num_codes``.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from vqmoe_megatron import registry
from vqmoe_megatron.config.checks import settled

if TYPE_CHECKING:
    from vqmoe_megatron.config.vq import VQConfig

IMPLICIT = ("fsq", "lfq")  # their code vectors follow from the code's number
SUMMED = ("residual",)  # C codes of a token are added; elsewhere they stand side by side
# Settings that only some quantizers have, as they stand where there is nothing to set.
_OWN_DEFAULTS = {"fsq_levels": None, "learn_code_scale": False, "train_projection": False}
# What an implicit codebook leaves no choice in.
_IMPLICIT_SETTINGS = {"freeze_codebook": True, "codebook_update": "gradient", "init": "uniform"}


def check_quantizer(vq: VQConfig) -> None:
    """Raise ``ValueError`` for settings that ``vq.quantizer`` lacks or that contradict it."""
    takes = registry.takes("quantizer", vq.quantizer)
    for name, default in _OWN_DEFAULTS.items():
        if (value := getattr(vq, name)) != default and name not in takes:
            having = [
                one
                for one in registry.KINDS["quantizer"].built_in
                if name in registry.takes("quantizer", one)
            ]
            raise ValueError(
                f"vq.{name}={value} is for vq.quantizer={' or '.join(having)}; leave it at "
                f"{'null' if default is None else str(default).lower()} with {vq.quantizer}"
            )
    if vq.quantizer in IMPLICIT:
        _check_implicit(vq)
    if vq.quantizer == "fsq":
        _check_levels(vq)
    if vq.quantizer == "lfq":
        signs = settled(vq.code_dim, "vq.code_dim")
        if vq.num_codes != 2**signs:
            raise ValueError(
                f"vq.num_codes == 2 ** vq.code_dim fails: {vq.num_codes} != 2 ** {signs} = "
                f"{2**signs}; lfq has a code for every choice of {signs} signs"
            )
    _check_trained(vq)


def _check_implicit(vq: VQConfig) -> None:
    wrong = [
        f"vq.{name}={str(legal).lower()} (it is {getattr(vq, name)})"
        for name, legal in _IMPLICIT_SETTINGS.items()
        if getattr(vq, name) != legal
    ]
    if wrong:
        raise ValueError(
            f"vq.quantizer={vq.quantizer}: its code vectors follow from their numbers, so none is "
            f"drawn from data, moved or re-seeded; set {', '.join(wrong)}"
        )


def _check_levels(vq: VQConfig) -> None:
    levels = vq.fsq_levels
    if not levels or len(levels) != vq.code_dim:
        raise ValueError(
            f"len(vq.fsq_levels) == vq.code_dim fails: {levels} and {vq.code_dim}; fsq rounds each "
            "of code_dim numbers to as many levels, for instance fsq_levels=[8,5,5,5] code_dim=4 "
            "num_codes=1000"
        )
    if min(levels) < 2:
        raise ValueError(f"vq.fsq_levels={levels} must be at least 2 each: one level says nothing")
    if vq.num_codes != prod(levels):
        raise ValueError(
            f"vq.num_codes == product of vq.fsq_levels fails: {vq.num_codes} != "
            f"{' * '.join(map(str, levels))} = {prod(levels)}"
        )


def frozen_errors(vq: VQConfig) -> Iterator[str]:
    """Yield what a run that draws its codebook anew cannot both train and freeze; one that loads it
    may hold still what was trained."""
    for name in ("learn_code_scale", "train_projection"):
        if getattr(vq, name) and vq.freeze_codebook and vq.quantizer not in IMPLICIT:
            yield (
                f"vq.{name}=true with vq.freeze_codebook=true: nothing of a frozen codebook is "
                "trained; leave one of them out"
            )


def _check_trained(vq: VQConfig) -> None:
    """What is trained beside the codes: by which gradient, and until when."""
    trained = [name for name in ("learn_code_scale", "train_projection") if getattr(vq, name)]
    if not trained:
        return
    if vq.freeze_after_steps is not None:
        raise ValueError(
            f"vq.{trained[0]}=true with vq.freeze_after_steps={vq.freeze_after_steps}: codes would "
            "stay and what they are compared by would move on; leave one of them out"
        )
    if vq.trains_scale and vq.vq_loss_coeff == 0:
        raise ValueError(
            "vq.learn_code_scale=true with vq.vq_loss_coeff=0: the codebook loss is the scale's "
            "only gradient; set it above 0"
        )
    passes = vq.has_discrete_path and vq.expert_input == "code" and vq.straight_through != "none"
    pulls = vq.vq_loss_coeff > 0 and vq.commitment_coeff > 0
    if vq.trains_projection and not (passes or pulls):
        raise ValueError(
            "vq.train_projection=true has no gradient here: it gets the tokens', by "
            "straight_through with expert_input=code, or by the commitment loss (vq_loss_coeff and "
            "commitment_coeff above 0)"
        )
