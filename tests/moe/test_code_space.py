"""What code space promises beyond equal values: what travels, which shapes, which precision.

N = 4 experts on P = 2 ranks, K = 10 codes, T = 8 tokens per rank.
"""

from __future__ import annotations

import pytest
import torch
from collective_log import logged_collectives, names_of
from tiny_layer import HIDDEN, build_layer, draw_parameters
from torch.utils._python_dispatch import TorchDispatchMode

from vqmoe_megatron.config import VQConfig

pytestmark = pytest.mark.distributed

EP2 = {"expert_model_parallel_size": 2}
NUM_CODES, NUM_SLOTS = 10, 6  # experts 0 and 1, those of rank 0, have three rows each
BASE = {"num_codes": NUM_CODES, "codebook_update": "gradient", "init": "uniform"}
PRODUCT = {"quantizer": "product", "num_code_slices": 2, "num_codes": 5}
# Operators whose result has a shape, or goes to the host, by what the data is.
DATA_DEPENDENT = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item")


class HostReads(TorchDispatchMode):
    """Lists operators that need values of tensors on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        name = func.overloadpacket.__name__
        if any(name.startswith(operator) for operator in DATA_DEPENDENT):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def tokens(which: str) -> torch.Tensor:
    """fp32 [S = 4, B = 2, H], other ones on every rank; or all of them the same token."""
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    x = torch.randn(4, 2, HIDDEN, generator=generator)
    return torch.ones_like(x) if which == "one code" else x


def observe(settings: dict, which: str, dtype: str = "float32") -> dict:
    """In a rank: one forward and backward; what was sent, and what the host read meanwhile."""
    vq = VQConfig(**{**BASE, **settings})
    dtype = getattr(torch, dtype)
    changes = {"params_dtype": dtype, "bf16": dtype == torch.bfloat16}
    layer = build_layer(vq, draw_parameters(vq), **changes).to(dtype)
    x = tokens(which).to(dtype).requires_grad_()
    layer(x)[0].sum().backward()  # the code map is read once
    reads, lists = HostReads(), []
    with logged_collectives() as forward, pytest.MonkeyPatch.context() as patch, reads:
        for name in ("tolist", "item", "__int__", "__bool__", "__float__"):
            real = getattr(torch.Tensor, name)
            patch.setattr(
                torch.Tensor,
                name,
                lambda tensor, name=name, real=real: lists.append(name) or real(tensor),
            )
        output, _ = layer(x)
    with logged_collectives() as backward:
        output.float().square().sum().backward()
    codes = [p.assigner(x.view(-1, HIDDEN)).codes for p in layer.paths if p.is_discrete]
    return {
        "forward": forward,
        "backward": backward,
        "read": reads.found + lists,
        "codes": codes[0] if codes else None,
        "output": output.detach(),
    }


@pytest.mark.parametrize("straight_through", ["none", "identity"])
@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("code_input", ["codebook", "learned"])
def test_no_token_travels_and_the_host_reads_nothing(
    ranks,  # noqa: ANN001
    straight_through: str,
    product: bool,
    code_input: str,
) -> None:
    settings = {
        "path": "discrete",
        "straight_through": straight_through,
        "code_input": code_input,
        **(PRODUCT if product else {}),
    }
    for found in ranks(2).run(observe, settings, "random", layout=EP2):
        assert found["forward"] == [["all_gather_into_tensor", "float32", [NUM_SLOTS, HIDDEN]]]
        assert found["backward"] == [["reduce_scatter_tensor", "float32", [2 * NUM_SLOTS, HIDDEN]]]
        assert found["read"] == []


def test_token_dispatch_does_read_on_the_host(ranks) -> None:  # noqa: ANN001
    """Or the test above could not fail."""
    settings = {"path": "discrete", "execution": "tokens"}
    for found in ranks(2).run(observe, settings, "random", layout=EP2):
        assert found["read"] == ["tolist"]
        assert names_of(found["forward"]) == 3 * ["all_to_all_single"]


@pytest.mark.parametrize("straight_through", ["none", "identity", "group"])
def test_what_is_sent_does_not_depend_on_the_tokens(ranks, straight_through: str) -> None:  # noqa: ANN001
    settings = {"path": "discrete", "straight_through": straight_through}
    at_random = ranks(2).run(observe, settings, "random", layout=EP2)
    all_alike = ranks(2).run(observe, settings, "one code", layout=EP2)
    for first, second in zip(at_random, all_alike, strict=True):
        assert first["codes"].unique().numel() > second["codes"].unique().numel() == 1
        assert first["forward"] == second["forward"]
        assert first["backward"] == second["backward"]


def test_of_two_paths_only_the_continuous_one_travels(ranks) -> None:  # noqa: ANN001
    both = ranks(2).run(observe, {"straight_through": "none"}, "random", layout=EP2)
    alone = ranks(2).run(observe, {"path": "continuous"}, "random", layout=EP2)
    for dual, continuous in zip(both, alone, strict=True):
        ours = dual["forward"]
        assert ours.pop() == ["all_gather_into_tensor", "float32", [NUM_SLOTS, HIDDEN]]
        assert names_of(ours) == names_of(continuous["forward"]) == 3 * ["all_to_all_single"]
        assert sorted(names_of(dual["backward"])) == sorted(
            [*names_of(continuous["backward"]), "reduce_scatter_tensor"]
        )
        assert dual["read"] == continuous["read"] == ["tolist"]


def test_the_straight_through_gradient_travels_in_the_backward_pass_only(ranks) -> None:  # noqa: ANN001
    settings = {"path": "discrete", "straight_through": "token"}
    for found in ranks(2).run(observe, settings, "random", layout=EP2):
        assert names_of(found["forward"]) == ["all_gather_into_tensor"]
        assert sorted(names_of(found["backward"])) == [
            *3 * ["all_to_all_single"],  # counts, gradients out, gradients back
            "reduce_scatter_tensor",
        ]
        assert found["read"] == []


def test_a_bf16_table_is_reduced_in_fp32(ranks) -> None:  # noqa: ANN001
    settings = {"path": "discrete", "straight_through": "none", "codebook_update": "ema"}
    for found in ranks(2).run(observe, settings, "random", "bfloat16", layout=EP2):
        assert found["output"].dtype == torch.bfloat16
        assert found["forward"] == [["all_gather_into_tensor", "bfloat16", [NUM_SLOTS, HIDDEN]]]
        assert found["backward"] == [["reduce_scatter_tensor", "float32", [2 * NUM_SLOTS, HIDDEN]]]


def row_gradients(num_tokens: int) -> dict:
    """In a rank: the table's gradient in a bf16 layer, for ones at every token's output."""
    vq = VQConfig(**BASE, path="discrete", norm="none", straight_through="none", num_code_slices=1)
    layer = build_layer(vq, draw_parameters(vq), params_dtype=torch.bfloat16, bf16=True)
    layer.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16()
    assignment = layer.assigner(x)
    space = layer.paths[-1].execution
    table = space.evaluate(torch.bfloat16)
    table.values.retain_grad()
    y = space.output(table, assignment, torch.bfloat16)
    y.backward(torch.ones_like(y))
    return {
        "values": table.values.detach(),
        "y": y.detach(),
        "gradient": table.values.grad,
        "slots": space.rows.slot_of_row[assignment.rows][:, 0],
        "of_weights": str(layer.experts.weight1.grad.dtype),
    }


def test_gradients_of_rows_are_summed_in_fp32(ranks) -> None:  # noqa: ANN001
    """Thousands of ones per code: bf16 sums would stop at 256."""
    (found,) = ranks(1).run(row_gradients, 20_000)
    assert found["values"].dtype == found["gradient"].dtype == torch.float32
    assert found["y"].dtype == torch.bfloat16 and found["of_weights"] == "torch.bfloat16"
    assert torch.equal(found["y"], found["values"].bfloat16()[found["slots"]])
    counts = torch.bincount(found["slots"], minlength=NUM_CODES).float()
    assert float(counts.max()) > 1000.0
    assert torch.equal(found["gradient"], counts[:, None].expand(-1, HIDDEN))


def replaced_map(how: str) -> dict:
    """In a rank: outputs in code space and in token dispatch after another map has come."""
    found = {}
    other_map = (torch.arange(NUM_CODES) // 3).flip(0)  # experts 3 0 0 0 ... : other slots too
    for execution in ("code_space", "tokens"):
        vq = VQConfig(**BASE, path="discrete", execution=execution)
        layer = build_layer(vq, draw_parameters(vq)).eval()
        x = tokens("random").double()
        with torch.no_grad():
            found[f"{execution} before"] = layer(x)[0]
            if how == "load_state_dict":
                state = {key: value.clone() for key, value in layer.state_dict().items()}
                state["assigner.code_map.expert_of_row"] = other_map
                layer.load_state_dict(state)
            elif how == "assign":
                layer.assigner.code_map.assign(other_map)
            else:
                layer.assigner.code_map.expert_of_row = other_map.clone()
            found[f"{execution} after"] = layer(x)[0]
        if execution == "code_space":
            space = layer.paths[-1].execution
            rows = space.rows
            found["local rows"], found["is kept"] = rows.local_rows, rows is space.rows
    return found


@pytest.mark.parametrize("how", ["load_state_dict", "assign", "another buffer"])
def test_rows_follow_a_replaced_code_map(ranks, how: str) -> None:  # noqa: ANN001
    results = ranks(2).run(replaced_map, how, layout=EP2)
    # row 0 is of expert 3; 1 2 3 of 2; 4 5 6 of 1; 7 8 9 of 0
    assert results[0]["local rows"].tolist() == [7, 8, 9, 4, 5, 6]
    assert results[1]["local rows"].tolist() == [1, 2, 3, 0, 0, 0]
    for found in results:
        for moment in ("before", "after"):
            torch.testing.assert_close(
                found[f"code_space {moment}"], found[f"tokens {moment}"], rtol=1e-12, atol=1e-12
            )
        assert not torch.allclose(found["code_space after"], found["code_space before"])
        assert found["is kept"]  # without a change the map is not read again


def merged(norm: str) -> dict:
    """In a rank: the table built by the experts alone, and the two steps that join other rows."""
    from vqmoe_megatron.moe.grouped_experts import evaluate_experts

    vq = VQConfig(**BASE, norm=norm)
    layer = build_layer(vq, draw_parameters(vq))
    space = layer.paths[-1].execution
    whole = space.evaluate(torch.float64)
    inputs = space.inputs(torch.float64)
    outputs = evaluate_experts(layer.experts, inputs.normed, space.rows.rows_per_local_expert)
    parts = space.table(inputs, outputs)
    return {
        "whole": whole.values.detach(),
        "parts": parts.values.detach(),
        "before": whole.before_norm,
        "flags": [
            whole.values.requires_grad,
            whole.before_norm.requires_grad,
            whole.inputs.raw.requires_grad,
            whole.inputs.normed.requires_grad,
        ],
    }


@pytest.mark.parametrize("norm", ["none", "separate"])
def test_what_is_kept_beside_the_values_has_no_graph(ranks, norm: str) -> None:  # noqa: ANN001
    for found in ranks(2).run(merged, norm, layout=EP2):
        assert found["flags"] == [True, False, False, False]
        torch.testing.assert_close(found["whole"], found["parts"], rtol=1e-13, atol=1e-13)
        assert torch.equal(found["whole"], found["before"]) is (norm == "none")


@pytest.mark.parametrize(("mode", "is_warned"), [("token", True), ("group", True), ("none", False)])
def test_experts_that_hide_their_activations_are_warned_about(mode: str, is_warned: bool) -> None:
    import warnings
    from types import SimpleNamespace

    from vqmoe_megatron.moe.executions.code_space import CodeSpace

    parts = SimpleNamespace(vq=VQConfig(num_codes=4, straight_through=mode), output_norm=None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        CodeSpace(parts, SimpleNamespace(experts=torch.nn.Identity()))
    assert ["Identity does not show its activations" in str(w.message) for w in said] == (
        [True] if is_warned else []
    )


@pytest.mark.parametrize("path", ["dual", "discrete"])
@pytest.mark.parametrize("straight_through", ["token", "group"])
def test_a_rank_whose_codes_no_token_chose_takes_part(
    ranks,  # noqa: ANN001
    path: str,
    straight_through: str,
) -> None:
    """All rows of equal tokens, one per slice, are rank 0's: rank 1 gets no gradient row."""
    few = {"num_codes": 1} if path == "dual" else {"num_codes": 4}
    settings = {**PRODUCT, **few, "path": path, "straight_through": straight_through}
    for found in ranks(2).run(observe, settings, "one code", layout=EP2):
        assert torch.isfinite(found["output"]).all()
