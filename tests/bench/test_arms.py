"""Arms as running layers, in a rank: shared weights, both passes, the gate, rows, saved bytes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vqmoe_megatron.bench.arm_table import ARMS
from vqmoe_megatron.bench.cases import LayerCase
from vqmoe_megatron.bench.progress import Progress

pytestmark = pytest.mark.distributed

PASSES = ("forward", "forward_backward")
SIZES = {"num_experts": 4, "num_codes": 10, "num_tokens": 24, "hidden_size": 32,
         "ffn_hidden_size": 48}  # fmt: skip


def build(letters: list[str], fields: dict):  # noqa: ANN201
    """In a rank: the arms, and what they were built from."""
    from vqmoe_megatron.bench.arms import build_arms
    from vqmoe_megatron.bench.shared_inputs import case_inputs

    inputs = case_inputs(LayerCase(**{**SIZES, **fields}))
    return inputs, build_arms({letter: ARMS[letter] for letter in letters}, inputs)


def measure(fields: dict) -> list[dict]:
    from vqmoe_megatron.bench.layer_bench import measure_layers

    return measure_layers(LayerCase(**{**SIZES, **fields}), PASSES, [], 3, 0, Progress())


@pytest.mark.parametrize(
    "fields",
    [
        {"norm": "none"},
        {"norm": "separate", "routing": "zipf"},
        {"norm": "shared", "routing": "one-hot"},
        {"norm": "separate", "dtype": "bfloat16"},
    ],
    ids=lambda fields: "-".join(fields.values()),
)
def test_all_arms_pass_the_gate_and_have_their_rows(ranks, fields: dict) -> None:  # noqa: ANN001
    (rows,) = ranks(1).run(measure, fields)
    for pass_name in PASSES:
        expected = [letter for letter, spec in ARMS.items() if pass_name in spec.passes]
        found = [row for row in rows if row["pass"] == pass_name]
        assert [row["arm"] for row in found] == expected
    for row in rows:
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert (row["num_experts"], row["num_codes"], row["num_tokens"]) == (4, 10, 24)
        assert row["expert_model_parallel_size"] == 1
        assert row["routing"] == fields.get("routing", "balanced")
        assert row["wire_bytes"] is None
        assert row["saved_bytes"] is None


def sabotage(letter: str, what: str, pass_name: str) -> str:
    """In a rank: damage one arm; return what the gate says."""
    from vqmoe_megatron.bench.cases import GateFailed
    from vqmoe_megatron.bench.gate import check_arms

    letters = {"top1": ["A", "D0"], "dual": ["D", "F3"], "discrete": ["C", "B", "F"]}
    inputs, arms = build(letters[ARMS[letter].function], {})
    layer = arms[letter].module
    for arm in arms.values():
        arm.enter(pass_name)
    if what == "weight":
        layer.experts.weight2 = torch.nn.Parameter(1.01 * layer.experts.weight2.detach())
    elif what == "gradient":
        space = layer.paths[-1].execution
        vq = dataclasses.replace(layer.vq, straight_through="none")
        space.parts = dataclasses.replace(space.parts, vq=vq)
    elif what == "gate":
        layer.gate.linear.bias = torch.nn.Parameter(layer.gate.linear.bias.detach() * 2.0)
    elif what == "nan":
        layer.gate.linear.bias = torch.nn.Parameter(layer.gate.linear.bias.detach() * torch.nan)
    try:
        check_arms(arms, inputs, torch.ones_like(inputs.x), pass_name, Progress())
    except GateFailed as failure:
        return str(failure)
    return ""


@pytest.mark.parametrize(
    ("letter", "what", "pass_name", "expected"),
    [
        ("D0", "weight", "forward", "D0 and A: output"),
        ("D0", "weight", "forward_backward", "D0 and oracle: gradient of x"),
        ("F", "gradient", "forward_backward", "F and C: gradient of x"),
        ("F", "gradient", "forward_backward", "F and oracle: gradient of x"),
        ("F3", "gate", "forward", "F3 and oracle: output"),
        ("F3", "nan", "forward", "F3 and D: output: nan"),
    ],
)
def test_the_gate_sees_a_damaged_arm(
    ranks,
    letter: str,
    what: str,
    pass_name: str,
    expected: str,  # noqa: ANN001
) -> None:
    assert expected in ranks(1).run(sabotage, letter, what, pass_name)[0]


def share() -> dict:
    """In a rank: whether the arms' experts lie in the same memory, and stay there."""
    inputs, arms = build(["A", "A1", "D0", "B", "C"], {"norm": "separate"})
    place = inputs.weights["experts.weight1"].untyped_storage().data_ptr()
    same = {
        letter: {p.untyped_storage().data_ptr() for p in arm.parameters["experts.weight1"]}
        == {place}
        for letter, arm in arms.items()
    }
    return {"same": same, "names": {letter: sorted(arm.parameters) for letter, arm in arms.items()}}


def test_arms_share_their_weights(ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(share)
    assert all(found["same"].values())
    experts = ["experts.weight1", "experts.weight2"]
    norms = [f"{side}_norm.{kind}" for side in ("input", "output") for kind in ("bias", "weight")]
    assert found["names"] == {
        "A": [*experts, "router.weight"],
        "A1": [*experts, "router.weight"],
        "D0": [*experts, "router.weight"],
        "B": sorted([*experts, *norms]),
        "C": sorted([*experts, *norms]),
    }


def steps() -> dict:
    """In a rank: whether a step leaves nothing behind, and how often the table is built."""
    inputs, arms = build(["C", "G8"], {})
    x = inputs.x
    found = {}
    for letter, arm in arms.items():
        arm.enter("forward_backward")
        builds = []
        execution = arm.module.paths[-1].execution
        if execution.keeps_table:
            evaluate = execution.space.evaluate
            execution.space.evaluate = lambda dtype, evaluate=evaluate, seen=builds: (
                seen.append(1) or evaluate(dtype)
            )
        leaf = x.clone().requires_grad_()
        arm.step(leaf, torch.ones_like(x))
        recorded = float(arm.module.assigner.codebook.step_count.sum())
        arm.forget()
        left = float(arm.module.assigner.codebook.step_count.sum())
        grads = [p.grad is None for p in arm.module.parameters()]
        found[letter] = [recorded, left, all(grads), len(builds)]
    return found


def test_a_step_is_recorded_and_forgotten(ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(steps)
    assert found == {"C": [24.0, 0.0, True, 0], "G8": [8 * 24.0, 0.0, True, 1]}


def memory(fields: dict) -> list[dict]:
    from vqmoe_megatron.bench.memory_bench import measure_memory

    return measure_memory(LayerCase(**{**SIZES, **fields}), [], Progress())


def test_saved_bytes_hold_what_is_predicted_and_not_much_more(ranks) -> None:  # noqa: ANN001
    (rows,) = ranks(1).run(memory, {"num_tokens": 512})
    saved = {row["arm"]: row["saved_bytes"] for row in rows}
    assert set(saved) == {a for a, spec in ARMS.items() if "forward_backward" in spec.passes}
    output_bytes, ids_bytes = 512 * 32 * 4, 512 * 8
    for row in rows:
        if row["predicted_saved_bytes"] is not None:
            # beyond the prediction: each path's output for gate and router, ids, router scores
            beyond = row["saved_bytes"] - row["predicted_saved_bytes"]
            assert 0 < beyond <= 5 * output_bytes + 20 * ids_bytes
    assert saved["E"] < saved["C"] / 3
    assert saved["C"] < saved["D"] < saved["B2"]
    assert 1.9 < saved["A2"] / saved["A"] < 2.1
