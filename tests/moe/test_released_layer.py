"""The layer and its block as the VQMoE release has them, against a transcription of its formulas.

T tokens, H hidden size, N experts, K codes, c the contribution rate, LN one LayerNorm. For a block
behind its attention, with the experts f_e, the code k of x and LN the same module in three places:

    u   = (1 - c) x + c sg(v_k - x)            y_d = LN(f_{k mod N}(LN(u)))
    y_c = softmax(g_e) f_e(x), e = argmax g, the softmax over the one selected logit
    y   = p_0 y_c + p_1 y_d, p = softmax(W x + b)
    out = LN(x + y)
    loss = task + 0.08 (mean |sg(x) - v|^2 + 0.25 mean |x - sg(v)|^2)

The router is frozen and nothing balances it; the codebook follows its loss by gradient.
"""

from __future__ import annotations

import pytest
import torch
from tiny_layer import (
    CUT,
    HIDDEN,
    NUM_EXPERTS,
    copy_parameters,
    draw_parameters,
    expert_place,
    join_experts,
    transformer_config,
)

from vqmoe_megatron.config import VQConfig

pytestmark = pytest.mark.distributed

NUM_TOKENS, BATCH, HEADS = 24, 2, 4
RATE = 0.05
RELEASED = {
    "path": "dual",
    "expert_input": "blend",
    "contribution_rate": RATE,
    "norm": "shared_with_block",
    "combine": "softmax",
    "codebook_update": "gradient",
    "vq_loss_coeff": 0.08,
    "commitment_coeff": 0.25,
    "init": "uniform",
    "dead_code_threshold": 0.0,
}
TP, EP = "tensor_model_parallel_size", "expert_model_parallel_size"
LAYOUTS = {"1rank": (1, {}), "ep2": (4, {EP: 2}), "tp2ep2": (4, {TP: 2, EP: 2})}


def settings(num_codes: int) -> VQConfig:
    return VQConfig(num_codes=num_codes, **RELEASED)


def drawn(num_codes: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Parameters, tokens [T, H], weights of the task's loss [T, H]; fp64."""
    generator = torch.Generator().manual_seed(3)
    x, g = torch.randn(2, NUM_TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    return draw_parameters(settings(num_codes)), x, g


def released_layer(x, p, num_codes: int):  # noqa: ANN001, ANN201
    """The formulas above: output [T, H] of the block, VQ loss, codes [T]."""
    v, w, b = p["assigner.codebook.codes"][0], p["input_norm.weight"], p["input_norm.bias"]

    def norm(z: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(z, (HIDDEN,), w, b)

    def expert(e: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        hidden = torch.einsum("tfh,th->tf", p["experts.weight1"][e], rows)
        hidden = (hidden + p["experts.bias1"][e]).relu()
        return torch.einsum("thf,tf->th", p["experts.weight2"][e], hidden) + p["experts.bias2"][e]

    k = torch.cdist(x, v).argmin(dim=1)
    u = (1 - RATE) * x + RATE * (v[k] - x).detach()
    y_d = norm(expert(k % NUM_EXPERTS, norm(u)))
    top, e = (x @ p["router.weight"].t() + p["router.bias"]).max(dim=1, keepdim=True)
    y_c = top.softmax(dim=1) * expert(e[:, 0], x)
    gate = (x @ p["gate.linear.weight"].t() + p["gate.linear.bias"]).softmax(dim=1)
    y = gate[:, :1] * y_c + gate[:, 1:] * y_d
    loss = (x.detach() - v[k]).square().mean() + 0.25 * (x - v[k].detach()).square().mean()
    return norm(x + y), 0.08 * loss, k


def new_block(num_codes: int, freeze_router: bool = True, has_attention: bool = False):  # noqa: ANN201
    """In a rank: Megatron's transformer layer of the release, fp64, and its configuration."""
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
    from megatron.core.transformer.spec_utils import build_module

    from vqmoe_megatron.moe import get_vqmoe_block_spec

    config = transformer_config(
        activation_func=torch.nn.functional.relu, hidden_dropout=0.0, attention_dropout=0.0
    )
    config.moe_router_pre_softmax = False  # behind its constructor, which refuses it
    block = get_vqmoe_block_spec(
        config, settings(num_codes), norm_placement="post", freeze_router=freeze_router
    )
    assert block.layer_norm is None  # the last block has its norm behind it
    (spec,) = block.layer_specs
    if not has_attention:
        spec.submodules.self_attention = IdentityOp
        spec.submodules.self_attn_bda = IdentityFuncOp
    return build_module(spec, config=config, layer_number=1).double()


def evaluate(num_codes: int, freeze_router: bool, task: float = 1.0) -> dict:
    """In a rank: its tokens through the block, forward and backward."""
    from megatron.core import parallel_state

    parameters, x, g = drawn(num_codes)
    block = new_block(num_codes, freeze_router)
    copy_parameters(block.mlp, parameters)
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    own = x.chunk(world)[rank].clone().requires_grad_()
    output, _ = block(own.view(-1, BATCH, HIDDEN))
    output = output.reshape(-1, HIDDEN)
    (task * (output * g.chunk(world)[rank]).sum()).backward()
    return {
        "output": output.detach(),
        "x": own.grad,
        "gradients": {n: p.grad for n, p in block.mlp.named_parameters() if p.grad is not None},
        "names": [name for name, _ in block.named_parameters()],
        "place": expert_place(),
        "data_parallel_size": parallel_state.get_data_parallel_world_size(),
    }


def gathered(results: list[dict]) -> dict[str, torch.Tensor]:
    """Of the whole world: tokens concatenated, gradients summed, experts put together."""
    found = {name: torch.cat([r[name] for r in results]) for name in ("output", "x")}
    for name in results[0]["gradients"]:
        cuts: dict[tuple[int, int], torch.Tensor] = {}
        for r in results:
            place = r["place"] if name.startswith(CUT) else (0, 0)
            cuts[place] = cuts.get(place, 0.0) + r["gradients"][name]
        found[name] = join_experts(name, cuts) if name.startswith(CUT) else cuts[0, 0]
    return found


def expected(num_codes: int, data_parallel_size: int, task: float = 1.0) -> dict[str, torch.Tensor]:
    parameters, x, g = drawn(num_codes)
    for tensor in (x, *parameters.values()):
        tensor.requires_grad_()
    output, loss, _ = released_layer(x, parameters, num_codes)
    (task * (output * g).sum() + data_parallel_size * loss).backward()  # a mean on every replica
    gradients = {name: tensor.grad for name, tensor in parameters.items()}
    return {"output": output.detach(), "x": x.grad, **gradients}


def check(results: list[dict], wanted: dict[str, torch.Tensor], without: set[str]) -> None:
    found = gathered(results)
    assert set(found) == set(wanted) - without
    for name, value in found.items():
        scale = max(1.0, float(wanted[name].abs().max()))
        assert float((value - wanted[name]).abs().max()) / scale < 1e-12, name


ROUTER = {"router.weight", "router.bias"}


# K = N, as every released script has it; (e) K != N: the expert is the code mod N
@pytest.mark.parametrize("num_codes", [NUM_EXPERTS, 3 * NUM_EXPERTS + 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_block_is_the_transcription(layout: str, num_codes: int, ranks) -> None:  # noqa: ANN001
    """Output and every gradient, the codebook's (f) among them, at every layout."""
    num_ranks, sizes = LAYOUTS[layout]
    results = ranks(num_ranks).run(evaluate, num_codes, True, layout=sizes)
    check(results, expected(num_codes, results[0]["data_parallel_size"]), without=ROUTER)
    norms = [name for name in results[0]["names"] if "norm" in name]
    assert norms == ["mlp.input_norm.weight", "mlp.input_norm.bias"]  # one module, saved once


def test_a_router_that_is_not_frozen_gets_a_gradient_of_zero(ranks) -> None:  # noqa: ANN001
    """(c): its weight is a softmax over one selected logit."""
    results = ranks(1).run(evaluate, NUM_EXPERTS, False)
    check(results, expected(NUM_EXPERTS, 1), without=set())
    for name in ROUTER:
        assert float(results[0]["gradients"][name].abs().max()) == 0.0


def test_the_task_moves_no_code(ranks) -> None:  # noqa: ANN001
    """(b): the codebook's gradient does not depend on the task's."""
    with_task, without = (
        ranks(1).run(evaluate, NUM_EXPERTS, True, task)[0]["gradients"]["assigner.codebook.codes"]
        for task in (1000.0, 0.0)
    )
    assert torch.equal(with_task, without) and float(without.abs().max()) > 0


def test_the_blend_s_value_and_jacobian() -> None:
    """(a): (1 - 2c) x + c v, (1 - c) I, and nothing to the codes."""
    from vqmoe_megatron.moe.discrete_input import mixed_input

    x, v = torch.randn(2, 5, HIDDEN, dtype=torch.float64).requires_grad_().unbind()
    u = mixed_input(x, v, settings(NUM_EXPERTS))[:, 0]
    torch.testing.assert_close(u, (1 - 2 * RATE) * x + RATE * v)
    g = torch.randn_like(u)
    dx, dv = torch.autograd.grad(u, (x, v), g, allow_unused=True)
    torch.testing.assert_close(dx, (1 - RATE) * g)
    assert dv is None or not dv.any()


def paths_of_one_expert() -> dict:
    """In a rank: which of the paths' outputs follow expert 1's first bias."""
    parameters, x, _ = drawn(NUM_EXPERTS)
    moved = {}
    for name, logit in (("continuous", 40.0), ("discrete", -40.0)):
        bias = torch.tensor([logit, 0.0], dtype=torch.float64)
        outputs = []
        for step in (0.0, 1.0):
            changed = {**parameters, "gate.linear.bias": bias}
            changed["experts.bias2"] = parameters["experts.bias2"].clone()
            changed["experts.bias2"][1] += step * torch.arange(HIDDEN)
            block = new_block(NUM_EXPERTS)
            copy_parameters(block.mlp, changed)
            outputs.append(block(x.view(-1, BATCH, HIDDEN))[0].detach())
        moved[name] = float((outputs[1] - outputs[0]).abs().max())
    return moved


def test_both_paths_read_the_same_expert_tensors(ranks) -> None:  # noqa: ANN001
    """(d)."""
    (moved,) = ranks(1).run(paths_of_one_expert)
    assert moved["continuous"] > 0.1 and moved["discrete"] > 0.1


def whole_block() -> dict[str, torch.Tensor]:
    """In a rank: a block with attention, and what torch's own attention makes of its weights."""
    torch.manual_seed(5)
    parameters, x, _ = drawn(NUM_EXPERTS)
    block = new_block(NUM_EXPERTS, has_attention=True)
    copy_parameters(block.mlp, parameters)
    with torch.no_grad():
        for parameter in (*block.self_attention.parameters(), *block.self_attn_bda.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    hidden = x.view(-1, BATCH, HIDDEN)
    found, _ = block(hidden, attention_mask=None)

    attention, norm = block.self_attention, block.self_attn_bda.norm
    qkv = hidden @ attention.linear_qkv.weight.t() + attention.linear_qkv.bias
    q, k, v = qkv.view(*hidden.shape[:2], HEADS, 3, -1).permute(3, 1, 2, 0, 4)  # [B, A, S, d]
    context = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    context = context.permute(2, 0, 1, 3).reshape(hidden.shape)
    attended = context @ attention.linear_proj.weight.t() + attention.linear_proj.bias
    z = torch.nn.functional.layer_norm(hidden + attended, (HIDDEN,), norm.weight, norm.bias)
    wanted, _, _ = released_layer(z.view(-1, HIDDEN), parameters, NUM_EXPERTS)
    return {"found": found.detach().reshape(-1, HIDDEN), "wanted": wanted.detach()}


def test_attention_has_its_norm_behind_it_too(ranks) -> None:  # noqa: ANN001
    (both,) = ranks(1).run(whole_block)
    torch.testing.assert_close(both["found"], both["wanted"], rtol=1e-11, atol=1e-11)


def unshared() -> str:
    """In a rank: what a bare layer says of a norm that no block shares."""
    from tiny_layer import build_layer

    layer = build_layer(settings(NUM_EXPERTS), draw_parameters(settings(NUM_EXPERTS)))
    try:
        layer(torch.zeros(2, 1, HIDDEN, dtype=torch.float64))
    except ValueError as error:
        return str(error)
    return ""


def test_a_norm_to_share_needs_a_block_that_takes_it(ranks) -> None:  # noqa: ANN001
    (said,) = ranks(1).run(unshared)
    assert "vq.norm=shared_with_block" in said and "norm_placement='post'" in said
