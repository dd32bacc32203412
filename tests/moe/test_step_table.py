"""One table per step: built once, differentiated once, equal to a table per microbatch."""

from __future__ import annotations

import pytest
import torch
from collective_log import logged_collectives, names_of
from tiny_layer import HIDDEN, build_layer, draw_parameters

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe import CodebookSync
from vqmoe_megatron.moe.executions.code_space import CodeTable, ExpertInputs
from vqmoe_megatron.moe.executions.step_table import StepTable

NUM_MICROBATCHES = 4
EP2 = {"expert_model_parallel_size": 2}
BASE = {
    "num_codes": 10,
    "codebook_update": "gradient",
    "init": "uniform",
    "dead_code_threshold": 0.0,
    "execution": "code_space",
}
PRODUCT = {"quantizer": "product", "num_code_slices": 2}
CASES = {
    "dual": {},
    "discrete-none": {"path": "discrete", "straight_through": "none"},
    "discrete-group-shared": {"path": "discrete", "straight_through": "group", "norm": "shared"},
    "product-learned": {**PRODUCT, "code_input": "learned"},
}


class Recorded:
    """Builds tables of a weight w [P * S, H], whose values are 2 w, and counts how often."""

    def __init__(self) -> None:
        self.weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
        self.num_built = 0

    def weights(self) -> list[torch.Tensor]:
        return []

    def evaluate(self, dtype: torch.dtype) -> CodeTable:
        self.num_built += 1
        values = (2 * self.weight).to(dtype)
        return CodeTable(values, values.detach(), ExpertInputs(values.detach(), values.detach()))


def test_gradients_of_all_readers_arrive_in_one_pass() -> None:
    made = Recorded()
    table = StepTable(made)
    passes = []
    made.weight.register_hook(passes.append)
    for factor in (1.0, 10.0, 100.0):
        (factor * table.get(True, torch.float64).values).sum().backward()
        assert made.weight.grad is None
    table.finish_table()
    assert made.num_built == 1 and len(passes) == 1
    assert made.weight.grad.unique().tolist() == [222.0]
    table.get(True, torch.float64)
    assert made.num_built == 2  # the next step builds its own


def test_a_step_without_readers_is_differentiated_all_the_same() -> None:
    """Its collectives have to run wherever those of the other ranks do."""
    made = Recorded()
    table = StepTable(made)
    table.get(True, torch.float64)
    table.finish_table()
    assert torch.equal(made.weight.grad, torch.zeros(3, 2, dtype=torch.float64))
    table.finish_table()  # without a table there is nothing to do
    assert made.num_built == 1


def test_cleared_tables_leave_no_gradient() -> None:
    made = Recorded()
    table = StepTable(made)
    table.get(True, torch.float64).values.sum().backward()
    table.clear()
    table.finish_table()
    assert made.weight.grad is None


def test_training_keeps_a_graph_even_inside_no_grad_and_evaluation_none() -> None:
    made = Recorded()
    table = StepTable(made)
    with torch.no_grad():  # as in the first pass of recompute
        assert table.get(True, torch.float64).values.requires_grad
    table.get(True, torch.float64).values.sum().backward()
    table.finish_table()
    assert made.weight.grad.unique().tolist() == [2.0]
    assert not table.get(False, torch.float64).values.requires_grad


def layer_of(settings: dict, **changes: object) -> torch.nn.Module:
    vq = VQConfig(**{**BASE, **settings})
    return build_layer(vq, draw_parameters(vq), **changes)


def microbatch(number: int) -> torch.Tensor:
    """fp64 [S = 3, B = 2, H], other ones on every rank."""
    generator = torch.Generator().manual_seed(100 * torch.distributed.get_rank() + number)
    return torch.randn(3, 2, HIDDEN, generator=generator, dtype=torch.float64)


def run_step(layer: torch.nn.Module, recompute: str = "none") -> dict:
    """In a rank: the four microbatches of a step; outputs, gradients and collectives."""
    from megatron.core import tensor_parallel

    outputs, of_x = [], []
    with logged_collectives() as calls:
        for number in range(NUM_MICROBATCHES):
            x = microbatch(number).requires_grad_()
            if recompute == "full":
                output = tensor_parallel.checkpoint(lambda h: layer(h)[0], False, x)
            else:
                output, _ = layer(x)
            output.square().sum().backward()
            outputs.append(output.detach())
            of_x.append(x.grad)
        layer.finish_table()
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    return {"output": outputs, "x": of_x, "gradients": gradients, "calls": names_of(calls)}


def compare(settings: dict, recompute: str) -> dict:
    """In a rank: a step with one table, and one with a table per microbatch."""
    changes = {}
    if recompute == "selective":
        changes = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    once = layer_of({**settings, "table_per_step": True}, **changes)
    return {
        "once": run_step(once, recompute),
        "each": run_step(layer_of(settings)),
    }


def check_equal(found: dict) -> None:
    once, each = found["once"], found["each"]
    for name in ("output", "x"):
        torch.testing.assert_close(once[name], each[name], rtol=1e-12, atol=1e-12)
    assert set(once["gradients"]) == set(each["gradients"])
    for name, expected in each["gradients"].items():
        scale = max(1.0, float(expected.abs().max()))
        error = float((once["gradients"][name] - expected).abs().max()) / scale
        assert error < 1e-12, f"{name} differs by {error:.3g} (relative)"


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_its_microbatches_with_tables_of_their_own(
    ranks,  # noqa: ANN001
    name: str,
    world_size: int,
) -> None:
    layout = EP2 if world_size == 2 else {}
    for found in ranks(world_size).run(compare, CASES[name], "none", layout=layout):
        check_equal(found)


@pytest.mark.distributed
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_one_all_gather_and_one_reduce_scatter_per_step(ranks, recompute: str) -> None:  # noqa: ANN001
    for found in ranks(2).run(compare, CASES["discrete-none"], recompute, layout=EP2):
        check_equal(found)
        assert found["once"]["calls"] == ["all_gather_into_tensor", "reduce_scatter_tensor"]
        assert found["each"]["calls"] == NUM_MICROBATCHES * found["once"]["calls"]


@pytest.mark.distributed
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_of_both_paths_builds_one_table(ranks, recompute: str) -> None:  # noqa: ANN001
    for found in ranks(2).run(compare, CASES["dual"], recompute, layout=EP2):
        check_equal(found)
        assert found["once"]["calls"].count("all_gather_into_tensor") == 1
        assert found["once"]["calls"].count("reduce_scatter_tensor") == 1


def finalized(settings: dict) -> dict:
    """In a rank: what Megatron's optimizer sees after DDP and CodebookSync."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    found = {}
    for name, per_step in (("once", True), ("each", False)):
        layer = layer_of({**settings, "table_per_step": per_step})
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=False)
        model = DistributedDataParallel(layer.config, ddp_config, layer)
        model.zero_grad_buffer()
        for number in range(NUM_MICROBATCHES):
            with model.no_sync():
                model(microbatch(number))[0].square().sum().backward()
        CodebookSync()([model])
        found[name] = {
            "output": [],
            "x": [],
            "gradients": {n: p.main_grad for n, p in layer.named_parameters() if p.requires_grad},
        }
        found[f"{name} is forgotten"] = not per_step or layer.paths[-1].execution._leaf is None
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["dual", "discrete-group-shared"])
def test_finalized_gradients_hold_the_tables_own(ranks, name: str) -> None:  # noqa: ANN001
    for found in ranks(2).run(finalized, CASES[name], layout=EP2):
        check_equal(found)
        assert found["once"]["gradients"]["experts.weight1"].any()
        assert found["once is forgotten"]


def modes() -> dict:
    """In a rank: how many tables are gathered in each phase of a training with evaluations."""
    layer = layer_of({"path": "discrete", "straight_through": "none", "table_per_step": True})
    counts, outputs = {}, {}

    def phase(name: str, num_forwards: int, is_trained: bool = False) -> None:
        with logged_collectives() as calls, torch.set_grad_enabled(is_trained):
            for _ in range(num_forwards):
                output, _ = layer(microbatch(0))
        counts[name] = names_of(calls).count("all_gather_into_tensor")
        outputs[name] = output.detach()

    phase("training", 3, True)
    layer.eval()
    phase("evaluation", 3)
    layer.train()
    phase("training again", 2, True)
    layer.finish_table()
    with torch.no_grad():
        layer.experts.weight2.mul_(2.0)
        layer.experts.bias2.mul_(2.0)
    phase("next step", 2, True)
    layer.eval()
    phase("second evaluation", 1)
    layer.eval()
    phase("evaluation announced again", 1)
    return {"counts": counts, "outputs": outputs}


@pytest.mark.distributed
def test_tables_end_with_their_step_and_with_the_mode(ranks) -> None:  # noqa: ANN001
    for found in ranks(2).run(modes, layout=EP2):
        assert set(found["counts"].values()) == {1}
        outputs = found["outputs"]
        for name in ("evaluation", "training again"):
            assert torch.equal(outputs[name], outputs["training"])
        for name in ("second evaluation", "evaluation announced again"):
            assert torch.equal(outputs[name], outputs["next step"])
        assert not torch.allclose(outputs["next step"], outputs["training"])


def reloaded() -> dict:
    """In a rank: outputs in evaluation before and after other weights are loaded."""
    found = {}
    for name, per_step in (("once", True), ("each", False)):
        layer = layer_of({"path": "discrete", "table_per_step": per_step}).eval()
        with torch.no_grad():
            found[f"{name} before"] = layer(microbatch(0))[0]
            state = {key: value.clone() for key, value in layer.state_dict().items()}
            state["experts.bias2"] += torch.arange(HIDDEN)  # the norm behind takes a constant away
            layer.load_state_dict(state)
            found[f"{name} after"] = layer(microbatch(0))[0]
    return found


@pytest.mark.distributed
def test_a_table_kept_in_evaluation_does_not_outlive_the_weights_it_was_built_of(ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(reloaded)
    assert torch.equal(found["once before"], found["each before"])
    assert not torch.allclose(found["each after"], found["each before"])
    assert torch.equal(found["once after"], found["each after"])


def refused_misuse() -> list[str]:
    """In a rank: what a loop without CodebookSync, and an evaluation within a step, are told."""
    told = []
    layer = layer_of({"path": "discrete", "table_per_step": True})
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(microbatch(0))[0].sum().backward()
    with pytest.raises(ValueError, match="between two microbatches of one step") as refused:
        layer.eval()
    told.append(str(refused.value))
    layer.train()  # the same mode again loses nothing
    assert layer.paths[-1].execution._leaf.values.grad.any()
    layer.assigner.codebook.codes.grad = None
    layer.input_norm.weight.grad = torch.ones_like(layer.input_norm.weight)
    with pytest.raises(ValueError, match="the optimizer steps before") as refused:
        optimizer.step()
    told.append(str(refused.value))
    with torch.no_grad():
        layer.input_norm.weight.mul_(2.0)
    layer.config.finalize_model_grads_func = CodebookSync()  # which this loop never calls
    with pytest.raises(ValueError, match="needs CodebookSync") as refused:
        layer(microbatch(1))
    told.append(str(refused.value))
    return told


@pytest.mark.distributed
def test_a_table_whose_gradient_would_be_lost_is_an_error(ranks) -> None:  # noqa: ANN001
    (told,) = ranks(1).run(refused_misuse)
    assert all("CodebookSync" in text for text in told)


def inference_first() -> bool:
    layer = layer_of({"path": "discrete", "code_input": "learned"})
    with torch.inference_mode():
        layer(microbatch(0))
    layer(microbatch(0))[0].sum().backward()
    return bool(layer.code_inputs.vectors.grad.any())


@pytest.mark.distributed
def test_training_may_follow_inference_mode(ranks) -> None:  # noqa: ANN001
    assert ranks(1).run(inference_first) == [True]


def weights_moved_in_evaluation() -> bool:
    layer = layer_of({"path": "discrete", "table_per_step": True}).eval()
    with torch.no_grad():
        before = layer(microbatch(0))[0]
        layer.experts.weight2.mul_(2.0)
        return torch.equal(before, layer(microbatch(0))[0])


@pytest.mark.distributed
def test_an_evaluation_sees_weights_that_moved(ranks) -> None:  # noqa: ANN001
    assert ranks(1).run(weights_moved_in_evaluation) == [False]
