"""Each quantizer has its own settings; others and contradictions are refused with the equation."""

from __future__ import annotations

import pytest

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.config.code_memory import CodeMemoryConfig
from vqmoe_megatron.config.memory_codebooks import hidden_quantizer
from vqmoe_megatron.config.quantizer_rules import frozen_errors

FIXED = {"freeze_codebook": True, "codebook_update": "gradient", "init": "uniform"}
FSQ = {**FIXED, "quantizer": "fsq", "code_dim": 2, "fsq_levels": [5, 3], "num_codes": 15}
LFQ = {**FIXED, "quantizer": "lfq", "code_dim": 4, "num_codes": 16}
TRAINED = {"quantizer": "low_dim", "code_dim": 4, "train_projection": True}
SCALED = {"quantizer": "cosine", "learn_code_scale": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsq_levels": [3]}, r"vq.fsq_levels=\[3\] is for vq.quantizer=fsq; leave it at null"),
        ({"learn_code_scale": True}, "is for vq.quantizer=cosine; leave it at false with euclid"),
        ({"train_projection": True}, "is for vq.quantizer=low_dim or fsq or lfq; leave it at"),
        ({"num_code_slices": 2}, "vq.num_code_slices=2 needs vq.quantizer=product or residual"),
        ({**FSQ, "code_dim": 3}, r"len\(vq.fsq_levels\) == vq.code_dim fails: \[5, 3\] and 3"),
        ({**FSQ, "fsq_levels": None}, "fails: None and 2; fsq rounds"),
        ({**FSQ, "fsq_levels": [15, 1]}, "must be at least 2 each"),
        ({**FSQ, "num_codes": 16}, r"== product of vq.fsq_levels fails: 16 != 5 \* 3 = 15"),
        ({**FSQ, "freeze_codebook": False}, r"set vq.freeze_codebook=true \(it is False\)"),
        ({**LFQ, "init": "data", "codebook_update": "ema"}, "codebook_update=gradient .*, vq.init"),
        ({**LFQ, "num_codes": 15}, r"== 2 \*\* vq.code_dim fails: 15 != 2 \*\* 4 = 16"),
        ({**LFQ, "code_dim": None}, "vq.code_dim=None with vq.quantizer=lfq"),
        ({**LFQ, "entropy_loss_coeff": -1.0}, "vq.entropy_loss_coeff=-1.0 must be at least 0"),
        ({**TRAINED, "freeze_after_steps": 5}, "vq.train_projection=true with vq.freeze_after_s"),
        ({**SCALED, "vq_loss_coeff": 0.0}, "the codebook loss is the scale's only gradient"),
        (
            {**TRAINED, "straight_through": "none", "commitment_coeff": 0.0},
            "vq.train_projection=true has no gradient here",
        ),
        ({"quantizer": "residual", "path": "filled"}, "with vq.quantizer=residual: a token reads"),
    ],
)
def test_what_does_not_apply_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQConfig(**changes)


@pytest.mark.parametrize(
    "settings",
    [
        FSQ,
        LFQ,
        {**FSQ, "train_projection": True},
        TRAINED,
        {**TRAINED, "straight_through": "none"},  # the commitment loss turns it
        SCALED,
        {"quantizer": "residual", "num_code_slices": 3},
        {**LFQ, "path": "filled"},
    ],
)
def test_what_applies_is_taken(settings: dict) -> None:
    vq = VQConfig(**settings)
    vq.check_model(hidden_size=16, num_experts=4)
    # a memory's codebook of hidden states is the plain one, whatever the layer's is
    of_memory = hidden_quantizer(vq, CodeMemoryConfig(num_rows=64, codes="hidden", num_codes=12))
    assert (of_memory.quantizer, of_memory.code_dim) == ("euclidean", None)


@pytest.mark.parametrize("settings", [SCALED, TRAINED], ids=["scale", "projection"])
def test_a_codebook_that_is_loaded_may_be_held_still(settings: dict) -> None:
    (name,) = {"learn_code_scale", "train_projection"} & set(settings)
    vq = VQConfig(**settings, freeze_codebook=True, vq_loss_coeff=0.0)
    assert not vq.trains_codebook and VQConfig(**settings).trains_codebook
    (error,) = frozen_errors(vq)
    assert error.startswith(f"vq.{name}=true with vq.freeze_codebook=true: nothing of a frozen")
    assert list(frozen_errors(VQConfig(**settings))) == []
    assert list(frozen_errors(VQConfig(**FSQ, train_projection=True))) == []


def test_residual_codes_do_not_cut_the_hidden_vector() -> None:
    VQConfig(quantizer="residual", num_code_slices=3).check_model(16, 4)
    with pytest.raises(ValueError, match=r"16 % 3 = 1; product codes cut the hidden vector"):
        VQConfig(quantizer="product", num_code_slices=3).check_model(16, 4)
    with pytest.raises(ValueError, match=r"4 > 3; lfq codes lie in a subspace"):
        VQConfig(**LFQ).check_model(3, 4)
