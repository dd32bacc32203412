"""The whole model equals a plain Transformer-XL in fp64: losses and every gradient, with memory."""

from __future__ import annotations

import pytest
import torch

HEADS, BATCH, LENGTH, VOCABULARY = 4, 2, 5, 40
RECIPE = [
    "model.vocab_size=40",
    "model.make_vocab_size_divisible_by=8",
    "model.num_layers=2",
    "model.hidden_size=16",
    f"model.num_attention_heads={HEADS}",
    "model.num_moe_experts=1",
    "model.moe_router_topk=1",
    "vq.path=continuous",
    f"model.seq_length={LENGTH}",
    f"train.micro_batch_size={BATCH}",
    "model.attention=transformer_xl",
    "model.position_embedding_type=relative",
    "model.init_method_std=0.4",
]
FULL = [
    "model.recompute_granularity=full",
    "model.recompute_method=uniform",
    "model.recompute_num_layers=1",
]


def double_model(overrides: list[str]):  # noqa: ANN201
    """In a rank: the chunk of a recipe in fp64, without DDP, every parameter drawn."""
    from real_model import RECIPE as PARITY

    from vqmoe_megatron.config.recipe import load_recipe
    from vqmoe_megatron.engines.megatron.model import build_chunks, build_transformer_config
    from vqmoe_megatron.plan.layout import check_layout

    config = load_recipe(PARITY, [*RECIPE, *overrides])
    layout = check_layout(config, 1, "cpu")
    (model,) = build_chunks(config, build_transformer_config(config, layout), layout)
    model.double()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.2 * noise  # biases and norms, too
    return model


def token_losses(model, tokens, labels) -> torch.Tensor:  # noqa: ANN001
    """``[b, S]`` in fp64: Megatron's own cross entropy is in fp32."""
    logits = model(tokens, torch.arange(LENGTH).repeat(BATCH, 1), None)[..., :VOCABULARY]
    lost = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none"
    )
    return lost.view(labels.shape)


def segments(num_segments: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(VOCABULARY, (BATCH, num_segments * LENGTH + 1), generator=generator)
    return [
        (text[:, start : start + LENGTH], text[:, start + 1 : start + LENGTH + 1])
        for start in range(0, num_segments * LENGTH, LENGTH)
    ]


def largest_errors(overrides: list[str], memory_length: int, num_microbatches: int) -> list[float]:
    """In a rank: over some segments, the largest errors of losses, and of gradients relative to the
    largest element of each."""
    from plain_transformer_xl import losses

    batch = BATCH * num_microbatches
    model = double_model(
        [
            *overrides,
            f"model.memory_length_tokens={memory_length}",
            f"train.global_batch_size={batch}",
        ]
    )
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    empty = torch.zeros(0, BATCH, 16, dtype=torch.float64)
    memories = [[empty, empty] for _ in range(num_microbatches)]
    worst_loss = worst_gradient = 0.0
    for number, (tokens, labels) in enumerate(segments(3 * num_microbatches)):
        model.zero_grad()
        ours = token_losses(model, tokens, labels)
        ours.sum().backward()
        which = number % num_microbatches
        theirs, memories[which] = losses(
            tokens, labels, memories[which], weights, HEADS, memory_length
        )
        wanted = torch.autograd.grad(theirs.sum(), list(weights.values()))
        worst_loss = max(worst_loss, float((ours - theirs).abs().max()))
        for (name, parameter), gradient in zip(model.named_parameters(), wanted, strict=True):
            assert float(gradient.abs().max()) > 0, name
            error = float((parameter.grad - gradient).abs().max() / gradient.abs().max())
            worst_gradient = max(worst_gradient, error)
    return [worst_loss, worst_gradient]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("overrides", "memory_length", "num_microbatches"),
    [
        pytest.param([], 5, 1, id="a segment"),
        pytest.param(["model.num_query_groups=2"], 7, 2, id="more than a segment, groups"),
        pytest.param(FULL, 3, 2, id="less than a segment, recompute"),
        pytest.param(
            ["model.recompute_granularity=selective"], 5, 1, id="core attention recomputed"
        ),
    ],
)
def test_the_model_is_a_plain_transformer_xl(ranks, overrides, memory_length, num_microbatches):
    (found,) = ranks(1).run(largest_errors, overrides, memory_length, num_microbatches)
    assert max(found) < 1e-10, found


def without_memory() -> float:
    from plain_transformer_xl import losses

    model = double_model(["train.global_batch_size=2"])
    weights = dict(model.named_parameters())
    empty = torch.zeros(0, BATCH, 16, dtype=torch.float64)
    worst = 0.0
    for tokens, labels in segments(2):
        ours = token_losses(model, tokens, labels)
        theirs, _ = losses(tokens, labels, [empty, empty], weights, HEADS, 1)
        worst = max(worst, float((ours - theirs).abs().max()))
    return worst


@pytest.mark.distributed
def test_without_a_memory_segments_know_nothing_of_each_other(ranks):
    (worst,) = ranks(1).run(without_memory)
    assert worst < 1e-10


def evaluated() -> list[list[float]]:
    """In a rank: what training and evaluation read, when they take turns."""
    model = double_model(["model.memory_length_tokens=5", "train.global_batch_size=2"])

    def loss(number: int) -> float:
        tokens, labels = segments(3)[number]
        return float(token_losses(model, tokens, labels).detach().sum())

    plain = [loss(0), loss(1), loss(2)]
    model.segment_memory.trained[0].clear()
    mixed = [loss(0), loss(1)]
    of_evaluation = []
    for _ in range(2):
        model.eval()
        of_evaluation.append([loss(0), loss(1)])
        model.train()
    return [plain, [*mixed, loss(2)], *of_evaluation]


@pytest.mark.distributed
def test_evaluation_begins_without_memory_and_leaves_that_of_training(ranks):
    plain, mixed, first, second = ranks(1).run(evaluated)[0]
    assert mixed == plain
    assert first == second == plain[:2]
