"""More than two paths: a further one is an entry in the layer's list, and changes no other."""

from __future__ import annotations

import pytest
import torch
from tiny_layer import HIDDEN, build_layer, draw_parameters, transformer_config

from vqmoe_megatron.config import VQConfig

pytestmark = pytest.mark.distributed

BASE = {"num_codes": 10, "init": "uniform", "codebook_update": "ema"}
EP2 = {"expert_model_parallel_size": 2}
EXECUTIONS = {
    "tokens": {"execution": "tokens"},
    "code space": {"execution": "code_space"},
    "one table per step": {"table_per_step": True},
}


def three_paths(settings: dict, kind: str) -> dict:
    """In a rank: a layer with a third path, and the sum of layers with fewer paths.

    ``shared`` is a dense expert for every token, ``codebook`` a second codebook over the same
    experts. The gate is ``sigmoid`` at zero: first + 0.5 second + 0.5 third. ``added`` is a dense
    expert that the gate does not see, before the others: first + 0.5 second + third.
    """
    from megatron.core.transformer.moe.moe_layer import MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    from vqmoe_megatron.moe import GroupedExperts, VQMoELayer
    from vqmoe_megatron.moe.expert_engine import Work
    from vqmoe_megatron.moe.part import DensePart
    from vqmoe_megatron.moe.paths import Path, Request

    class SharedExpert(Path):
        is_weighed = kind != "added"

        def __init__(self, linear: torch.nn.Module) -> None:
            self.linear = linear

        def ask(self, hidden_states: torch.Tensor, x: torch.Tensor) -> Request:
            none = torch.empty(0, dtype=torch.int64)
            return Request(Work(), lambda _: DensePart(self.linear(x)), none)

    class ThreePaths(VQMoELayer):
        def build_paths(self, seed: int) -> list[Path]:
            paths = super().build_paths(seed)
            if kind != "codebook":
                self.shared_expert = torch.nn.Linear(HIDDEN, HIDDEN)
                expert = SharedExpert(self.shared_expert)
                return [*paths, expert] if kind == "shared" else [expert, *paths]
            first = {name: getattr(self, name) for name in NAMES}
            paths.append(self._discrete_path(seed + 1))
            for name, module in first.items():  # the layer's names stay the first codebook's
                setattr(self, f"second_{name}", getattr(self, name))
                setattr(self, name, module)
            return paths

    NAMES = ("assigner", "code_inputs", "input_norm", "output_norm")
    vq = VQConfig(**BASE, **settings, combine="sigmoid", combine_bias=0.0, norm="separate")
    submodules = MoESubmodules(experts=ModuleSpec(module=GroupedExperts))
    three = ThreePaths(transformer_config(), submodules, layer_number=1, vq=vq).double()
    drawn = draw_parameters(vq)
    with torch.no_grad():
        three.gate.linear.weight.zero_()
        three.gate.linear.bias.zero_()
    num_logits = three.gate.linear.out_features
    two = build_layer(vq, drawn)
    state = two.state_dict()
    for name in ("gate.linear.weight", "gate.linear.bias"):
        state[name].zero_()
    three.load_state_dict(
        {name: value for name, value in state.items() if not name.startswith("gate.")},
        strict=False,
    )
    for path in three.discrete_paths:
        path.assigner.codebook.needs_data_init = False

    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    x = torch.randn(4, 2, HIDDEN, generator=generator, dtype=torch.float64)
    output, _ = three(x)
    output.square().sum().backward()
    three.finish_table()
    recorded = [float(p.assigner.codebook.step_count.sum()) for p in three.discrete_paths]
    with torch.no_grad():
        first_two, _ = two.eval()(x)
        alone = three.eval()
        from vqmoe_megatron.moe.combine_gate import OnePath

        paths, is_weighed = alone.paths, SharedExpert.is_weighed
        alone.paths, alone.gate = [paths[0] if kind == "added" else paths[2]], OnePath()
        SharedExpert.is_weighed = True
        third, _ = alone(x)
        alone.paths, SharedExpert.is_weighed = paths, is_weighed
    parts = iter([p.clone() for p in three.local_parts()])
    three.scalars_of(parts)
    assert not list(parts)  # every path takes its own, so that the next one finds its
    scalars, load, usage = three.apply_parts(iter([p.clone() for p in three.local_parts()]))
    return {
        "output": output.detach(),
        "sum": first_two + (1.0 if kind == "added" else 0.5) * third,
        "num_logits": num_logits,
        "third": third,
        "gradients": {n: p.grad is not None for n, p in three.named_parameters()},
        "recorded": recorded,
        "load": float(load.sum()),
        "usage": float(usage.sum()),
        "scalars": sorted(scalars),
        "trained": [n for n, p in three.named_parameters() if p.requires_grad],
    }


@pytest.mark.parametrize("kind", ["shared", "codebook", "added"])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_third_path_adds_itself_and_nothing_else(ranks, execution: str, kind: str) -> None:  # noqa: ANN001
    for found in ranks(2).run(three_paths, EXECUTIONS[execution], kind, layout=EP2):
        torch.testing.assert_close(found["output"], found["sum"], rtol=1e-12, atol=1e-12)
        assert found["third"].abs().max() > 1e-3
        assert found["num_logits"] == (1 if kind == "added" else 2)
        assert [n for n in found["trained"] if not found["gradients"][n]] == []
        num_codebooks = 2 if kind == "codebook" else 1
        assert found["recorded"] == [8.0] * num_codebooks
        assert found["load"] == 8.0 * (1 + num_codebooks)  # rows of 8 tokens, by each path
        assert found["usage"] == 8.0
        assert "code_perplexity" in found["scalars"]
