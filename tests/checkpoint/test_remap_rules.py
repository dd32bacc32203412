"""What may be remapped, and what the console is told: settings only, no torch, no ranks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from vqmoe_megatron.checkpoint.remap_rules import check_remap
from vqmoe_megatron.config import CodeMemoryConfig, ModelConfig, RunConfig, VQConfig


def config(num_experts=8, num_codes=16, model=None, **vq) -> RunConfig:
    settings = {"vocab_size": 256, "num_moe_experts": num_experts, **(model or {})}
    return RunConfig(model=ModelConfig(**settings), vq=VQConfig(num_codes=num_codes, **vq))


FIXED = {"freeze_codebook": True, "codebook_update": "gradient", "init": "uniform"}
LFQ = {**FIXED, "quantizer": "lfq", "code_dim": 3}
FSQ = {**FIXED, "quantizer": "fsq", "code_dim": 2, "fsq_levels": [3, 2]}
SCALED = {"quantizer": "cosine", "learn_code_scale": True}


def told(stored: RunConfig, wanted: RunConfig) -> str:
    return "\n".join(check_remap(stored, wanted))


def test_more_experts_by_a_multiple_keep_the_discrete_function():
    text = told(config(8), config(16))
    assert "experts 8 -> 16: new expert e starts as a copy of expert e mod 8" in text
    assert "discrete path computes exactly the same function" in text
    assert "probability of an expert is split over its copies" in text
    assert "optimizer, schedule, data position" in text
    assert "codes 16" not in text


def test_a_discrete_model_has_no_continuous_path_to_warn_of():
    text = told(config(8, path="discrete"), config(16, path="discrete"))
    assert "exactly the same function" in text
    assert "continuous" not in text and "router" not in text


def test_other_numbers_of_experts_change_the_function_of_counted_codes():
    # 16 codes, experts r mod 12 mod 8 against r mod 8: rows 12..15 go to 0..3 instead of 4..7.
    assert "4 of 16 codes change their expert's function" in told(config(8), config(12))
    # 16 codes, experts r mod 4 against r mod 8: rows 4..7 and 12..15.
    text = told(config(8), config(4))
    assert "the first 4 are kept, 4 are dropped" in text
    assert "8 of 16 codes change their expert's function" in text
    assert "tokens of the dropped experts go to others" in text


def test_more_codes_are_duplicates_that_wait_for_revival():
    text = told(config(8, 16), config(8, 32))
    assert "codes 16 -> 32 per slice: new code k starts as a copy of code k mod 16" in text
    assert "the 16 copies get no tokens until they are moved" in text
    assert "exactly the same function" in text and "another expert" not in text
    # 12 mod 8: the copies 12..23 of codes 0..11 go to experts 4..7, 0..7 instead of 0..7, 0..3.
    text = told(config(8, 12), config(8, 24))
    assert "exactly the same function" in text
    assert "12 of 12 copied codes go to another expert than their original" in text


def test_copies_that_nothing_will_ever_move_are_pointed_out():
    off = {"dead_code_threshold": 0.0}
    assert "may never get tokens" in told(config(8, 16, **off), config(8, 32, **off))
    frozen = {"freeze_codebook": True}
    assert "more codes have no use" in told(config(8, 16, **frozen), config(8, 32, **frozen))
    later = {"freeze_after_steps": 500}
    text = told(config(8, 16), config(8, 32, **later))
    assert "vq.freeze_after_steps=500 counts the checkpoint's steps, too" in text
    assert "vq.freeze_after_steps None -> 500" in text
    assert "freeze" not in told(config(8, 16, **later), config(16, 16, **later))
    assert "vq.revival 'random' -> 'error'" in told(config(8), config(16, revival="error"))
    moved = {"codebook_update": "reanchor", "dead_code_threshold": 0.0}
    assert "never" not in told(config(8, 16, **moved), config(8, 32, **moved))


def test_codes_of_several_slices_are_counted_by_their_row():
    product = {"quantizer": "product", "num_code_slices": 2}
    # Slice 1 starts at row 20 instead of 16: all its 16 codes move on by 4 of 8 experts.
    text = told(config(8, 16, **product), config(8, 20, **product))
    assert "16 of 32 codes change their expert's function" in text
    assert "exactly" in told(config(8, 16, **product), config(8, 24, **product))


def test_fewer_codes_keep_the_first_and_claim_no_equal_function():
    text = told(config(8, 16), config(8, 12))
    assert "codes 16 -> 12 per slice: the first 12 are kept" in text
    assert "all 12 kept codes keep their expert's function" in text and "exactly" not in text


def test_settings_that_shape_nothing_are_named_and_allowed():
    stored, wanted = config(8), config(16, model={"hidden_dropout": 0.1}, ema_decay=0.5)
    text = told(stored, wanted)
    assert "model.hidden_dropout 0.0 -> 0.1" in text and "vq.ema_decay 0.99 -> 0.5" in text
    assert "apart from the settings above, the discrete path computes exactly" in text
    silent = config(16, init="uniform", model={"recompute_granularity": "selective"})
    assert "also different" not in told(stored, silent)


def test_implicit_and_residual_codes_stay_what_they_are_with_more_experts():
    for vq in (LFQ, FSQ, {"quantizer": "residual", "num_code_slices": 3}):
        num_codes = {"lfq": 8, "fsq": 6}.get(vq["quantizer"], 16)
        text = told(config(8, num_codes, **vq), config(16, num_codes, **vq))
        assert "experts 8 -> 16" in text and "per slice" not in text


@pytest.mark.parametrize(
    ("stored", "wanted", "reason"),
    [
        (config(8), config(8), "nothing to remap"),
        (config(8, 16, path="continuous"), config(8, 32, path="continuous"), "has no codes"),
        (config(8, code_map="balanced"), config(16), "vq.code_map: checkpoint 'balanced'"),
        (config(8), config(16, code_map="clustered"), "vq.code_map: recipe 'clustered'"),
        (config(8), config(16, quantizer="product", num_code_slices=2), "vq.num_code_slices"),
        (config(8), config(16, path="discrete"), "vq.path: checkpoint 'dual', recipe 'discrete'"),
        (config(8), config(16, codebook_update="gradient"), "vq.codebook_update"),
        (config(8, path="filled"), config(16, path="filled"), "a copied code or expert would"),
        (config(8), config(16, norm="none"), "vq.norm"),
        (config(8), config(16, model={"hidden_size": 512}), "model.hidden_size"),
        (config(8), config(16, model={"vocab_size": 300}), "model.vocab_size"),
        (config(8), config(16, model={"norm_placement": "post"}), "model.norm_placement"),
        (config(8), config(16, quantizer="residual"), "codes of the one are no codes of the other"),
        (config(8, 8, **LFQ), config(8, 16, **{**LFQ, "code_dim": 4}), "vq.code_dim"),
        (config(8, 6, **FSQ), config(8, 9, **{**FSQ, "fsq_levels": [3, 3]}), "vq.fsq_levels"),
        (config(8, **SCALED), config(16, quantizer="cosine"), "vq.learn_code_scale"),
        (config(8), config(16, model={"normalization": "RMSNorm"}), "model.normalization"),
    ],
)
def test_what_cannot_be_remapped_is_refused_with_its_reason(stored, wanted, reason):
    with pytest.raises(ValueError, match="remapped") as refused:
        check_remap(stored, wanted)
    assert reason in str(refused.value)


def test_everything_that_is_wrong_is_listed_at_once():
    wanted = config(8, code_map="balanced", model={"num_layers": 6})
    with pytest.raises(ValueError) as refused:
        check_remap(config(8), wanted)
    for reason in ("model.num_layers", "vq.code_map", "nothing to remap"):
        assert reason in str(refused.value)


def test_the_sequence_length_counts_where_positions_are_learned():
    def learned(num_experts, **model):
        return config(num_experts, model={"position_embedding_type": "learned_absolute", **model})

    with pytest.raises(ValueError, match="model.seq_length"):
        check_remap(learned(8), learned(16, seq_length=512))
    assert check_remap(config(8), config(16, model={"seq_length": 512}))


def test_a_continuous_model_remaps_its_experts_whatever_its_code_map():
    path = {"path": "continuous", "code_map": "balanced"}
    text = told(config(8, **path), config(16, **path))
    assert "split over its copies" in text and "discrete" not in text and "codes" not in text


def test_every_setting_of_model_and_vq_is_shaping_or_named_when_it_differs():
    # A new setting that shapes tensors must be added to the list; a wrong name there is caught.
    from vqmoe_megatron.checkpoint.remap_rules import (
        REMAPPED,
        SHAPING_SETTINGS,
        WITHOUT_EFFECT,
    )

    stored = config(8)
    for name in (*REMAPPED, *SHAPING_SETTINGS, *WITHOUT_EFFECT):
        section, field = name.split(".")
        assert hasattr(getattr(stored, section), field), name


def test_the_rules_need_no_torch():
    code = (
        "import sys; import vqmoe_megatron.checkpoint.remap_rules; "
        "sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_shared_expert_must_stay_as_wide():
    plain = {"add_bias_linear": False}
    shared = {**plain, "moe_shared_expert_intermediate_size": 64}
    with pytest.raises(ValueError, match="moe_shared_expert_intermediate_size: checkpoint None"):
        told(config(8, model=plain), config(16, model=shared))
    assert "experts 8 -> 16" in told(config(8, model=shared), config(16, model=shared))


def test_one_expert_has_no_router_to_copy_from():
    for path in ("dual", "continuous"):
        with pytest.raises(ValueError, match="checkpoint 1, recipe 4; .* no router"):
            told(config(1, path=path), config(4, path=path))
    assert "experts 1 -> 4" in told(config(1, path="discrete"), config(4, path="discrete"))
    assert "the first 1 are kept, 7 are dropped" in told(config(8), config(1))


MEMORY = CodeMemoryConfig(num_rows=64, codes="embedding", num_context_codes=4, lr_mult=1.0)


@pytest.mark.parametrize(
    "changed",
    [
        {"num_rows": 128},
        {"num_rows": 0},
        {"codes": "random", "num_context_codes": 0},
        {"num_codes": 128},
        {"max_order": 2},
        {"num_context_codes": 8},
        {"context_decay": 0.5},
        {"context_dim": 16},
        {"layers": [1]},
        {"values": "experts"},
        {"gate": "token"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_code_memory_must_be_the_checkpoints(changed):
    stored = replace(config(8), code_memory=MEMORY)
    wanted = replace(config(16), code_memory=replace(MEMORY, **changed))
    with pytest.raises(ValueError, match=rf"code_memory\.{next(iter(changed))}: checkpoint"):
        check_remap(stored, wanted)


def test_settings_of_a_memory_that_is_off_decide_nothing():
    stored = replace(config(8), code_memory=replace(MEMORY, num_rows=0))
    assert told(stored, config(16)) == told(config(8), config(16))


def test_what_shapes_no_memory_may_differ():
    stored = replace(config(8), code_memory=MEMORY)
    wanted = replace(config(16), code_memory=replace(MEMORY, exchange="table", lr_mult=5.0))
    text = told(stored, wanted)
    assert "every row stays what it is" in text and "code_memory.lr_mult 1.0 -> 5.0" in text
    assert "code_memory.exchange" not in text
    of_experts = replace(MEMORY, values="experts")
    both = (replace(config(n), code_memory=of_experts) for n in (8, 16))
    assert "tokens read other values" in told(*both)
    assert "code memory" not in told(config(8), config(16))


@pytest.mark.parametrize("side", ["stored", "wanted"])
def test_only_megatrons_own_router_is_remapped(side: str) -> None:
    sides = {"stored": config(8), "wanted": config(16)}
    sides[side] = config(sides[side].model.num_moe_experts, model={"moe_router": "x_moe"})
    with pytest.raises(ValueError, match="moe_router=x_moe: checkpoint.remap knows .*topk only"):
        told(**sides)
    told(config(8, model={"moe_router": "x_moe"}, path="discrete"), config(16, path="discrete"))
