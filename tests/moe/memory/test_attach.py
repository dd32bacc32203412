"""The stream tied to a GPTModel: documents, microbatches under way, recompute, foreign callers."""

from __future__ import annotations

import pytest
import torch
from fast_tier import only
from real_model import _unwrapped, recipe

pytestmark = pytest.mark.distributed

EP, TP = "parallel.expert_model_parallel_size", "parallel.tensor_model_parallel_size"
MEMORY = [
    "code_memory.num_rows=32",
    "code_memory.codes=embedding",
    "code_memory.num_codes=40",
    "vq.init=uniform",
]
RECOMPUTE = {
    "none": [],
    "moe": ["model.recompute_granularity=selective", "model.recompute_modules=[moe]"],
    "uniform": [
        "model.recompute_granularity=full",
        "model.recompute_method=uniform",
        "model.recompute_num_layers=1",
    ],
    "block": [
        "model.recompute_granularity=full",
        "model.recompute_method=block",
        "model.recompute_num_layers=1",
    ],
}


def build_gpt(overrides: list[str]):  # noqa: ANN201
    """This rank's GPTModel in fp64, in training mode, with loud rows and drawn codes."""
    from vqmoe_megatron.engines.megatron.model import build_model, build_transformer_config
    from vqmoe_megatron.plan.layout import check_layout

    every = [*MEMORY, "model.num_layers=2", "model.moe_router_dtype=fp64", *overrides]
    config = recipe(every)
    layout = check_layout(config, torch.distributed.get_world_size(), "cpu")
    (wrapped,) = build_model(config, build_transformer_config(config, layout), layout)
    model = _unwrapped(wrapped)
    wrapped.grad_accs = []  # its hooks add to fp32 buffers
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    model.double().train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".code_memory." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    stream = model.code_stream
    if stream.moves:
        stream.code_of_token.copy_(
            torch.randint(40, stream.code_of_token.shape, generator=generator)
        )
    return config, model


def batch_of(config, number: int, num_sequences: int = 2):  # noqa: ANN001, ANN201
    generator = torch.Generator().manual_seed(number)
    size = (num_sequences, config.model.seq_length)
    tokens = torch.randint(config.model.vocab_size, size, generator=generator)
    positions = torch.arange(size[1]).expand(size).clone()
    positions[0, 5:] -= 5  # a second document
    return tokens, positions


def gradients_of(overrides: list[str], order: list[str]) -> dict:
    """Passes in an order such as f0 f1 b0 b1; the losses, and gradients by name."""
    config, model = build_gpt(overrides)
    losses = {}
    for step in order:
        number = int(step[1:])
        if step[0] == "f":
            tokens, positions = batch_of(config, number)
            losses[number] = model(tokens, positions, None, labels=tokens).double().mean()
        elif step[0] == "e":  # evaluated in between, as a loop might
            with torch.no_grad():
                tokens, positions = batch_of(config, number)
                model(tokens, positions, None, labels=tokens)
        else:
            losses[number].backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"losses": [float(loss) for loss in losses.values()], "gradients": found}


@pytest.mark.parametrize("kind", only(RECOMPUTE, "uniform", "moe"))
def test_a_recomputed_layer_reads_the_rows_of_its_own_microbatch(kind: str, ranks) -> None:  # noqa: ANN001
    pool = ranks(1)
    (plain,) = pool.run(gradients_of, [], ["f0", "b0", "f1", "b1", "f2", "b2"])
    order = ["f0", "f1", "b0", "f2", "b1", "b2"]
    (ours,) = pool.run(gradients_of, RECOMPUTE[kind], order)
    assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-12)
    assert set(ours["gradients"]) == set(plain["gradients"])
    for name, expected in plain["gradients"].items():
        error = (ours["gradients"][name] - expected).abs().max() / expected.abs().max().clamp(min=1)
        assert float(error) < 1e-11, name


def test_evaluated_passes_in_between_change_nothing(ranks) -> None:  # noqa: ANN001
    """Also where Megatron's decoder gives outputs that require gradients though none are kept."""
    pool, uniform = ranks(1), RECOMPUTE["uniform"]
    (plain,) = pool.run(gradients_of, uniform, ["f0", "b0", "f1", "b1"])
    (ours,) = pool.run(gradients_of, uniform, ["e5", "e6", "f0", "f1", "e7", "b0", "b1"])
    for name, expected in plain["gradients"].items():
        torch.testing.assert_close(ours["gradients"][name], expected, rtol=1e-11, atol=1e-12)


def rows_read(overrides: list[str], kind: str) -> dict:
    """The planned slots of one microbatch, by how its documents were told; or what was refused."""
    from megatron.core.packed_seq_params import PackedSeqParams

    config, model = build_gpt(overrides)
    tokens, positions = batch_of(config, 0)
    length = config.model.seq_length
    call = {"input_ids": tokens, "position_ids": positions, "attention_mask": None}
    if kind == "packed":
        call["position_ids"] = torch.arange(1, length + 1).expand(2, length)  # none is zero
        borders = torch.tensor([0, 5, length, 2 * length], dtype=torch.int32)
        call["packed_seq_params"] = PackedSeqParams(cu_seqlens_q=borders, cu_seqlens_kv=borders)
    if kind == "padded":  # the same borders, of which one document's last tokens are padding
        call["position_ids"] = torch.arange(1, length + 1).expand(2, length)
        borders = torch.tensor([0, 5, length, 2 * length], dtype=torch.int32)
        call["packed_seq_params"] = PackedSeqParams(
            cu_seqlens_q=torch.tensor([0, 5, length - 2, 2 * length - 2], dtype=torch.int32),
            cu_seqlens_q_padded=borders,
        )
    if kind == "unbroken":
        call["position_ids"] = torch.arange(length).expand(2, length)
    if kind == "no positions":
        call["position_ids"] = None
    if kind == "no tokens":
        call["input_ids"] = None
    if kind == "cached":
        call["inference_context"] = object()
    if kind == "no stream":
        model._forward_pre_hooks.clear()
    if kind in ("packed", "padded", "unbroken", "positions"):
        hook = next(iter(model._forward_pre_hooks.values()))
        hook(model, (), call)
        return {"slots": model.code_stream.microbatches.current.plan.ids, "told": ""}
    try:
        model(**call)
    except ValueError as error:
        return {"told": str(error)}
    return {"told": ""}


def test_documents_are_told_by_positions_or_packed_lengths(ranks) -> None:  # noqa: ANN001
    pool = ranks(1)
    slots = {
        kind: pool.run(rows_read, [], kind)[0]["slots"]
        for kind in ("positions", "packed", "padded", "unbroken")
    }
    assert torch.equal(slots["positions"], slots["packed"])
    assert torch.equal(slots["positions"], slots["padded"])
    assert not torch.equal(slots["positions"], slots["unbroken"])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no positions", "needs input_ids and position_ids"),
        ("no tokens", "needs input_ids and position_ids"),
        ("cached", "without a cache"),
        ("no stream", "attach_code_stream"),
    ],
)
def test_refused(kind: str, message: str, ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(rows_read, [], kind)
    assert message in found["told"]
