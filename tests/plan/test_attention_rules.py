"""What Transformer-XL's attention is refused with, before ranks start."""

from __future__ import annotations

import pytest
from real_model import recipe

from vqmoe_megatron.plan.layout import layout_errors

RELATIVE = ["model.attention=transformer_xl", "model.position_embedding_type=relative"]
MEMORY = [*RELATIVE, "model.memory_length_tokens=16"]
LOCAL = ["model.transformer_impl=local", "model.gradient_accumulation_fusion=false"]


def errors(overrides: list[str], device: str = "cpu", num_ranks: int = 1) -> str:
    return "\n".join(layout_errors(recipe(overrides), num_ranks, device))


def test_it_runs_on_both_devices() -> None:
    assert errors(MEMORY) == ""
    assert errors([*MEMORY, *LOCAL], "cuda") == ""
    assert errors([*RELATIVE, *LOCAL[:1]], "cuda") == ""
    assert errors(["parallel.context_parallel_size=2"], num_ranks=2) == ""


@pytest.mark.parametrize(
    ("overrides", "device", "words"),
    [
        (["model.transformer_impl=transformer_engine"], "cpu", "transformer_impl=transformer_eng"),
        ([], "cuda", "transformer_impl=auto: it is made of Megatron's local modules"),
        ([*LOCAL[:1]], "cuda", "gradient_accumulation_fusion=null: the memory's keys"),
        (["model.gradient_accumulation_fusion=true"], "cpu", "gradient_accumulation_fusion=true"),
        (["model.fp8=hybrid"], "cpu", "model.fp8=hybrid"),
        (["train.cuda_graphs=true"], "cpu", "train.cuda_graphs was never tried"),
        (["data.eval_stride_tokens=8"], "cpu", "data.eval_stride_tokens=8: evaluation reads"),
        (["data.eval_window_tokens=8"], "cpu", "data.eval_window_tokens=8: evaluation reads"),
        (["train.engine=deepspeed"], "cpu", "train.engine=deepspeed: its memory"),
        (["train.nan_policy=skip"], "cpu", "train.nan_policy=skip: the memory would keep"),
        (
            ["train.nan_policy=rollback", "checkpoint.save_interval=1"],
            "cpu",
            "train.nan_policy=rollback: the memory",
        ),
        (
            ["code_memory.num_rows=64", "code_memory.codes=embedding",
             "code_memory.num_context_codes=8"],
            "cpu",
            "num_context_codes=8: contexts begin anew",
        ),
    ],
)  # fmt: skip
def test_it_is_refused_with(overrides: list[str], device: str, words: str) -> None:
    assert words in errors([*MEMORY, *overrides], device)


def test_it_is_refused_with_cut_sequences() -> None:
    found = errors([*RELATIVE, "parallel.context_parallel_size=2"], num_ranks=2)
    assert "context_parallel_size = 2 > 1: a rank's part of a segment" in found


def test_without_a_memory_a_bad_step_may_be_skipped() -> None:
    assert errors([*RELATIVE, "train.nan_policy=skip"]) == ""
