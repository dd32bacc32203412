"""The rules of ``vq.path=filled``: experts that a token does not visit answer by its code.

The path has a learned router and a codebook, and neither a discrete path nor a combine gate.
Choices that only they have are refused, but for those that say nothing; their numbers
(combine_bias, contribution_rate) are left to the recipe, where one may serve several paths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vqmoe_megatron.config.vq import VQConfig

_NO_DISCRETE = "the experts a token is sent to see the token, the others see its code vector"
_NO_GATE = "there is no combine gate: the router's probabilities weigh both"
# Legal values of the discrete path's keys, and why there are no others.
_FOREIGN: dict[str, tuple[tuple[object, ...], str]] = {
    "expert_input": (("code",), _NO_DISCRETE),
    "code_input": (("codebook",), "table rows are made of the code vectors as they are"),
    "execution": (("auto", "code_space"), "one row per expert and code is evaluated, never tokens"),
    "code_map": (("mod",), "every expert has a row of every code"),
    "straight_through": (
        ("token", "none"),
        "the code is a hard choice, through which no token gets a gradient",
    ),
    "norm": (("separate", "none"), "there are no norms around the experts"),
    "combine": (("softmax",), _NO_GATE),
    "num_code_slices": (
        (1,),
        "a token reads one row per expert; of C slices it would read C, and an expert's answer to "
        "a slice is not a share of its answer to the code",
    ),
    "overlap_table": ((False,), "its table is built in the layer, or kept for the step"),
}
_OWN_DEFAULTS = {"num_fill_experts": None, "fill_values": "experts", "threshold_routing": False}


def check_fill(vq: VQConfig) -> None:
    """Raise ``ValueError`` for keys that do not go with ``vq.path``."""
    if vq.path != "filled":
        for name, default in _OWN_DEFAULTS.items():
            if (value := getattr(vq, name)) != default:
                raise ValueError(
                    f"vq.{name}={value} is for vq.path=filled, but vq.path={vq.path}; set "
                    f"path=filled, or leave it at {default}"
                )
        return
    for name, (legal, reason) in _FOREIGN.items():
        if (value := getattr(vq, name)) not in legal:
            words = " or ".join(str(one) for one in legal)
            raise ValueError(
                f"vq.path=filled with vq.{name}={value}: {reason}; leave {name} at {words}"
            )
    if vq.quantizer in ("product", "residual"):
        raise ValueError(
            f"vq.path=filled with vq.quantizer={vq.quantizer}: a token reads one row per expert, "
            "of one code; use quantizer=euclidean, cosine, low_dim, fsq or lfq"
        )
    if vq.num_fill_experts == 0 and not vq.threshold_routing:
        raise ValueError(
            "vq.path=filled with vq.num_fill_experts=0 and vq.threshold_routing=false does nothing "
            "that path=continuous does not; set one of them, or use path=continuous"
        )
    if not vq.has_fill_table and vq.fill_values != "experts":
        raise ValueError(
            f"vq.fill_values={vq.fill_values} with vq.num_fill_experts=0: there is no table; leave "
            "fill_values at experts, or num_fill_experts at null for all"
        )


def check_fill_model(vq: VQConfig, num_experts: int) -> None:
    """Raise ``ValueError`` where more experts shall answer than there are, or one alone."""
    if vq.path == "filled" and num_experts == 1:
        raise ValueError(
            "vq.path=filled with num_moe_experts=1: one expert sees every token, and there is none "
            "to answer by code; use vq.path=continuous, or more experts"
        )
    if vq.num_fill_experts is not None and vq.num_fill_experts > num_experts:
        raise ValueError(
            f"vq.num_fill_experts <= num_moe_experts fails: {vq.num_fill_experts} > {num_experts}; "
            "null stands for all of them"
        )


def fill_in_words(vq: VQConfig) -> str:
    """How a filled layer is evaluated; one line for the user."""
    words = "experts chosen by the router see the token"
    if vq.threshold_routing:
        words = (
            "an expert sees a token where probability times distance to its code exceeds a moving "
            "threshold (one expert per token on average)"
        )
    if not vq.has_fill_table:
        return f"{words}; no fill (vq.num_fill_experts=0)"
    among = (
        "the others"
        if vq.num_fill_experts is None
        else f"others among the {vq.num_fill_experts} most likely"
    )
    kind = {
        "experts": "",
        "detached": ", without gradient into the experts",
        "direct": ", learned directly",
    }[vq.fill_values]
    per = "step" if vq.table_per_step else "microbatch"
    return (
        f"{words}; {among} answer by its code: {vq.num_codes} rows per expert{kind}, one table per "
        f"{per}"
    )
