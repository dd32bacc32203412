"""Attention on the CPU against Megatron's own, and what it leaves to Megatron's."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

HEADS, COLUMNS, LENGTH, BATCH = 4, 8, 37, 2
NAMES = ("output", "query", "key", "value")


def attentions(**changes):  # noqa: ANN201
    """In a rank: ours and Megatron's, of one configuration."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from tiny_layer import transformer_config

    from vqmoe_megatron.moe.cpu_attention import CpuAttention

    mask_type = changes.pop("attn_mask_type", "causal")
    softmax_scale, layer_number = changes.pop("softmax_scale", None), 2
    settings = {
        "num_layers": 2,
        "hidden_size": HEADS * COLUMNS,
        "num_attention_heads": HEADS,
        "attention_dropout": 0.0,
        **changes,
    }
    config, mask_type = transformer_config(**settings), AttnMaskType[mask_type]
    return [
        kind(config, layer_number, mask_type, "self", softmax_scale=softmax_scale)
        for kind in (CpuAttention, DotProductAttention)
    ]


def inputs(dtype: torch.dtype, groups: int, **lengths: int) -> list[torch.Tensor]:
    """Query, key and value as the projection leaves them: parts of one tensor."""
    generator = torch.Generator().manual_seed(1)

    def drawn(heads: int, length: int) -> torch.Tensor:
        wide = torch.randn(length, BATCH, heads, 3 * COLUMNS, generator=generator)
        return wide.to(dtype)[..., COLUMNS : 2 * COLUMNS].detach().requires_grad_()

    num_keys = lengths.get("num_keys", LENGTH)
    return [drawn(HEADS, LENGTH), drawn(groups, num_keys), drawn(groups, num_keys)]


@contextmanager
def counted():  # noqa: ANN201
    """Calls of torch's CPU kernel meanwhile, forward passes alone."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[str] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN202
            if "flash_attention_for_cpu.default" in str(func):
                calls.append(str(func))
            return func(*args, **(kwargs or {}))

    with Calls():
        yield calls


def results(attention, states: list[torch.Tensor], mask=None) -> list[torch.Tensor]:  # noqa: ANN001
    """Output and the gradients of query, key and value under a drawn gradient."""
    output = attention(*states, mask)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    return [output, *torch.autograd.grad(output, states, grad)]


def differences(dtype: str, groups: int, changes: dict) -> dict[str, float]:
    """In a rank: the largest difference to Megatron's of each, relative to the largest element."""
    ours, theirs = attentions(num_query_groups=groups, **changes)
    states = inputs(getattr(torch, dtype), groups)
    with counted() as calls:
        found = results(ours, states)
    assert len(calls) == 1
    wanted = results(theirs, states)
    assert found[0].is_contiguous() and found[0].dtype == wanted[0].dtype
    return {
        name: float((one - other).abs().max() / other.abs().max())
        for name, one, other in zip(NAMES, found, wanted, strict=True)
    }


@pytest.mark.distributed
@pytest.mark.parametrize("groups", [HEADS, 2, 1])
@pytest.mark.parametrize(
    ("dtype", "changes", "limit"),
    [
        ("float64", {}, 1e-12),
        ("float64", {"softmax_scale": 0.7}, 1e-12),
        ("float64", {"attn_mask_type": "no_mask"}, 1e-12),
        ("float32", {}, 1e-5),
        ("bfloat16", {"bf16": True, "attention_softmax_in_fp32": True}, 3e-2),
    ],
)
def test_outputs_and_gradients_are_megatron_s(ranks, dtype, groups, changes, limit) -> None:
    (found,) = ranks(1).run(differences, dtype, groups, changes)
    assert max(found.values()) < limit, found


def left_to_megatron(case: str) -> list[bool]:
    """In a rank: whether results are Megatron's to the bit, and none came of torch's kernel."""
    from megatron.core import tensor_parallel

    changes, lengths, mask = {}, {}, None
    if case == "dropout":
        changes = {"attention_dropout": 0.5}
    elif case == "a mask":  # of documents: 11 tokens, and those behind them
        place = torch.arange(LENGTH)
        beyond = place[None, :] > place[:, None]
        mask = (beyond | ((place[:, None] >= 11) & (place[None, :] < 11)))[None, None]
    elif case == "window":
        changes = {"window_size": (5, 0)}
    elif case == "scores scaled per layer":
        changes = {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}
    elif case == "sink":
        changes = {"softmax_type": "off-by-one"}
    elif case == "more keys":
        lengths, changes = {"num_keys": LENGTH + 3}, {"attn_mask_type": "no_mask"}
    ours, theirs = attentions(**changes)
    states = inputs(torch.float32, HEADS, **lengths)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    before = tracker.get_states()
    with counted() as calls:
        found = results(ours, states, mask)
    tracker.set_states(before)
    wanted = results(theirs, states, mask)
    return [all(map(torch.equal, found, wanted)), not calls]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "case",
    ["dropout", "a mask", "window", "scores scaled per layer", "sink", "more keys"],
)
def test_the_rest_is_megatron_s(ranks, case: str) -> None:
    assert ranks(1).run(left_to_megatron, case) == [[True, True]]


def without_dropout() -> list[int]:
    """In a rank: calls of torch's kernel by a model that drops out, evaluated; and on ``meta``."""
    ours, _ = attentions(attention_dropout=0.5)
    with counted() as calls:
        ours.eval()(*inputs(torch.float32, HEADS), None)
    with counted() as of_meta:
        ours(*(states.to("meta") for states in inputs(torch.float32, HEADS)), None)
    return [len(calls), len(of_meta)]


@pytest.mark.distributed
def test_evaluation_drops_nothing_and_meta_is_no_cpu(ranks) -> None:
    assert ranks(1).run(without_dropout) == [[1, 0]]


def refused(name: str) -> str:
    """In a rank: Megatron's words for what its attention does not take."""
    ours, _ = attentions()
    states = inputs(torch.float32, HEADS)
    try:
        ours(*states, None, **{name: torch.zeros(1)})
    except (AssertionError, TypeError) as error:
        return str(error)
    return "taken"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("attention_bias", "Attention bias is not supported"),
        ("packed_seq_params", "Packed sequence is not supported"),
        ("not_yet_known", "unexpected keyword argument 'not_yet_known'"),
    ],
)
def test_megatron_refuses_what_it_refused(ranks, name: str, words: str) -> None:
    (text,) = ranks(1).run(refused, name)
    assert words in text


def repeated() -> list[bool]:
    """In a rank: whether two passes agree to the bit on two threads, in deterministic mode."""
    ours, _ = attentions(num_query_groups=1)
    threads, was = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (results(ours, inputs(torch.float32, 1)) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(was)
    return list(map(torch.equal, first, second))


@pytest.mark.distributed
def test_deterministic_mode_repeats_its_bits(ranks) -> None:
    assert ranks(1).run(repeated) == [[True] * 4]


def kinds_in_specs() -> list[str]:
    """In a rank: the core attention of both specs."""
    from tiny_layer import transformer_config

    from vqmoe_megatron.config import VQConfig
    from vqmoe_megatron.moe import get_vqmoe_block_spec, vqmoe_layer_spec

    config = transformer_config(num_layers=2, moe_layer_freq=2)
    layers = [*get_vqmoe_block_spec(config, VQConfig(num_codes=8)).layer_specs, vqmoe_layer_spec]
    return [layer.submodules.self_attention.submodules.core_attention.__name__ for layer in layers]


@pytest.mark.distributed
def test_every_local_layer_on_a_cpu_has_it(ranks) -> None:
    assert ranks(1).run(kinds_in_specs) == [["CpuAttention"] * 3]
