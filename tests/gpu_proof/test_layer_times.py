"""The cases of the part: sizes as in the recipes, tokens whose experts are clear in bf16."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from vqmoe_megatron.bench import gate
from vqmoe_megatron.bench.arm_table import ARMS, FORWARD_BACKWARD
from vqmoe_megatron.bench.gate import few_tokens
from vqmoe_megatron.bench.shared_inputs import routed_tokens
from vqmoe_megatron.gpu_proof.layer_times import LETTERS, REFERENCE, TINY_LETTERS, _cases

BF16_SPACING = 2.0**-8  # of logits between 1/2 and 1


def test_codes_follow_the_rule_of_the_recipes() -> None:
    sizes = [(case.num_experts, case.num_codes, case.num_tokens) for case in _cases(False)]
    assert sizes == [(64, 1920, 8192), (128, 1792, 8192), (64, 1920, 32768), (128, 1792, 32768)]
    for case in _cases(False):
        assert (case.hidden_size, case.ffn_hidden_size, case.dtype) == (2048, 1408, "bfloat16")


def test_every_arm_takes_a_step_and_one_is_megatron_s() -> None:
    assert all(FORWARD_BACKWARD in ARMS[letter].passes for letter in (*LETTERS, *TINY_LETTERS))
    assert ARMS[REFERENCE].kind == "megatron" and REFERENCE in LETTERS


@pytest.mark.full
@pytest.mark.parametrize("case", _cases(False), ids=lambda case: case.words)
def test_the_gate_s_tokens_have_a_clear_second_expert(case) -> None:  # noqa: ANN001
    """Else bf16 may choose another than the oracle, and top-2 fails the gate for no fault."""
    tokens = routed_tokens(case)
    logits = few_tokens(tokens.x).double() @ tokens.router_weight.double().t()
    best = logits.topk(3, dim=1).values
    assert float((best[:, 1] - best[:, 2]).min()) > 2 * BF16_SPACING


def measured(folder: str, spoiled: str) -> tuple[list[dict], dict[str, list[dict]]]:
    """In a rank: checks and tables of the tiny case, with something spoiled."""
    from vqmoe_megatron.gpu_proof import layer_times
    from vqmoe_megatron.gpu_proof.part import Job

    job = Job("layer", "cpu", True, 100.0, Path(folder), Path(folder))
    with pytest.MonkeyPatch.context() as patch:
        {"arm": spoil_an_arm, "gate": spoil_the_gate}[spoiled](patch)
        layer_times._measure(job, _cases(True)[0], TINY_LETTERS)
    return job.findings.checks, job.findings.tables


def spoil_an_arm(patch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(ARMS["E"], vq={**ARMS["E"].vq, "path": "no such path"})
    patch.setitem(ARMS, "E", spec)


def spoil_the_gate(patch: pytest.MonkeyPatch) -> None:
    """D0 and A differ by more than this, and F from the oracle."""
    patch.setitem(gate.TOLERANCE, "float32", 0.0)


@pytest.mark.distributed
def test_an_arm_that_cannot_run_fails_alone(ranks, tmp_path: Path) -> None:  # noqa: ANN001
    ((checks, tables),) = ranks(1).run(measured, str(tmp_path), "arm")
    (failed,) = [check for check in checks if not check["passed"]]
    assert "arm E" in failed["name"] and "no such path" in failed["text"]
    rows = tables["Layer, forward and backward"]
    assert [row["arm"] for row in rows] == ["A", "D0", "F"]


@pytest.mark.distributed
def test_arms_that_disagree_are_not_timed(ranks, tmp_path: Path) -> None:  # noqa: ANN001
    ((checks, tables),) = ranks(1).run(measured, str(tmp_path), "gate")
    failed = [check["name"] for check in checks if not check["passed"]]
    assert any(name.endswith("arms agree") for name in failed)
    assert any("is the oracle's" in name for name in failed)
    assert tables == {}
