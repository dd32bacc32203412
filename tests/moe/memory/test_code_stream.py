"""The stream of codes moves once per step, alike on all replicas, and stays once frozen."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from collective_log import logged_collectives
from real_model import _batches, _unwrapped, recipe, task_of

pytestmark = pytest.mark.distributed

TP, PP, EP = (f"{name}_model_parallel_size" for name in ("tensor", "pipeline", "expert"))
VPP = "virtual_pipeline_model_parallel_size"
NUM_CODES, WIDTH, VOCABULARY = 40, 48, 384  # padded
NUM_CONTEXT_CODES = 6
MEMORY = [
    "model.num_layers=2",
    "code_memory.num_rows=32",
    "code_memory.codes=embedding",
    f"code_memory.num_codes={NUM_CODES}",
    f"code_memory.num_context_codes={NUM_CONTEXT_CODES}",
    "code_memory.context_dim=8",
    "code_memory.freeze_after_steps=3",
    "code_memory.exchange=rows",
    "code_memory.lr_mult=1.0",
    "train.train_iters=20",
]
# What only the stream sends: counts and codes of entries, sums and vectors of codes.
SHAPES = ([VOCABULARY], [NUM_CODES, WIDTH + 1], [NUM_CODES, WIDTH], [VOCABULARY, 8])


def tables_of(model: list) -> dict[str, torch.Tensor]:
    """Copies of every chunk's tables and of the source's state, by chunk and name."""
    return {
        f"{number}.{name}": value.clone()
        for number, chunk in enumerate(model)
        for name, value in _unwrapped(chunk).code_stream.state_dict().items()
        if torch.is_tensor(value)
    }


def train_steps(overrides: list[str], num_steps: int, spoiled: int, evaluated: int) -> list[dict]:
    """In a rank: train; one step may see a NaN, and passes without gradients follow another."""
    from vqmoe_megatron.engines.megatron.engine import MegatronEngine
    from vqmoe_megatron.plan.layout import check_layout

    config = recipe([*MEMORY, *overrides])
    layout = check_layout(config, torch.distributed.get_world_size(), "cpu")
    parts = MegatronEngine.build(config, layout, task_of(config))
    for chunk in parts.model:
        chunk.train()
    found = []
    for number in range(num_steps):
        torch.manual_seed(100 + number)  # all ranks alike
        batches = list(zip(range(64), _batches(config), strict=False))
        if number == spoiled:
            for _, batch in batches:
                batch["loss_mask"] = batch["loss_mask"] * torch.nan
        with logged_collectives() as calls:
            result = parts.step([iter([b for _, b in batches]) for _ in parts.model], 0, False)
        if number == evaluated:
            batch = next(_batches(config))
            with torch.no_grad():
                for is_training in (False, True):
                    for chunk in parts.model:
                        chunk.train(is_training)
                        chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        found.append(
            {
                "tables": tables_of(parts.model),
                "skipped": result.skipped,
                "loss": result.loss,
                "context_perplexity": [
                    float(layer.scalars["context_perplexity"])
                    for layer in parts.layers
                    if "context_perplexity" in layer.scalars
                ],
                "of_stream": [
                    call for call in calls if call[2] in SHAPES and "all_to_all" not in call[0]
                ],
            }
        )
    return found


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        pytest.param(4, {TP: 2, EP: 2}, id="tp2-ep2"),
        pytest.param(2, {PP: 2}, id="pp2"),
        pytest.param(4, {PP: 2, EP: 2}, id="pp2-ep2", marks=pytest.mark.full),
    ],
)
def test_replicas_are_bit_equal_and_a_frozen_stream_is_silent(num_ranks, layout, ranks) -> None:  # noqa: ANN001
    overrides = [f"parallel.{name}={size}" for name, size in layout.items()]
    results = ranks(num_ranks).run(train_steps, overrides, 5, -1, -1, layout=layout)
    for of_rank in results:
        for number, (step, theirs) in enumerate(zip(of_rank, results[0], strict=True)):
            for name, table in step["tables"].items():  # the first rank has every table
                assert torch.equal(table, theirs["tables"][name]), name
            assert int(step["tables"]["0.num_steps"]) == number + 1
            assert bool(step["of_stream"]) == (number < 3)
        codes = [step["tables"]["0.code_of_token"] for step in of_rank]
        assert not torch.equal(codes[1], codes[0])  # the first round
        assert torch.equal(codes[3], codes[2]) and torch.equal(codes[4], codes[2])
        assert codes[2].unique().numel() > NUM_CODES // 2
        contexts = [step["tables"]["0.context_codes"] for step in of_rank]
        assert contexts[2].unique(dim=0).shape[0] == NUM_CONTEXT_CODES


def test_the_step_says_how_many_contexts_it_saw(ranks) -> None:  # noqa: ANN001
    (steps,) = ranks(1).run(train_steps, ["code_memory.freeze_after_steps=9"], 5, -1, -1)
    of_steps = [step["context_perplexity"] for step in steps]
    assert of_steps[:3] == [[], [], []]  # their codebook begins at the second step's end
    assert all(1.5 < perplexity <= NUM_CONTEXT_CODES for (perplexity,) in of_steps[3:])


def test_a_spoiled_step_and_evaluation_move_nothing(ranks) -> None:  # noqa: ANN001
    (plain,) = ranks(1).run(train_steps, [], 4, -1, -1)
    (spoiled,) = ranks(1).run(train_steps, [], 4, 1, -1)
    assert [step["skipped"] for step in spoiled] == [False, True, False, False]
    for name, table in spoiled[1]["tables"].items():
        assert torch.equal(table, spoiled[0]["tables"][name]), name
    assert int(spoiled[3]["tables"]["0.num_steps"]) == 3
    (evaluated,) = ranks(1).run(train_steps, [], 4, -1, 1)
    for ours, theirs in zip(evaluated, plain, strict=True):
        assert ours["loss"] == theirs["loss"]
        for name, table in theirs["tables"].items():
            assert torch.equal(ours["tables"][name], table), name


def foreign_loop(kind: str, num_steps: int) -> list[list]:
    """In a rank: loops of others around a bare GPTModel; steps counted and codes after each."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from vqmoe_megatron.engines.megatron.model import build_model, build_transformer_config
    from vqmoe_megatron.moe import synchronize_codebooks
    from vqmoe_megatron.plan.layout import check_layout

    config = recipe(MEMORY)
    layout = check_layout(config, torch.distributed.get_world_size(), "cpu")
    transformer = build_transformer_config(config, layout)
    (wrapped,) = build_model(config, transformer, layout)
    model = _unwrapped(wrapped).train()
    if kind != "schedule":
        wrapped.grad_accs = []  # no DDP: gradients stay where torch puts them
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    batches, found = _batches(config), []

    def forward(data, module):  # noqa: ANN001, ANN202
        batch = next(data)
        losses = module(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return losses, lambda output: (output.float().mean(), {})

    for _ in range(num_steps):
        if kind == "schedule":
            transformer.finalize_model_grads_func = partial(finalize_model_grads)
            wrapped.zero_grad_buffer()
            get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=batches,
                model=wrapped,
                num_microbatches=2,
                seq_length=config.model.seq_length,
                micro_batch_size=1,
                forward_only=False,
            )
            for parameter in parameters:
                parameter.grad = parameter.main_grad.clone()
        else:
            for _ in range(2):
                output, loss_of = forward(batches, model)
                loss_of(output)[0].backward()
        if kind == "synchronize":
            synchronize_codebooks(model)
        optimizer.step()
        optimizer.zero_grad()
        stream = model.code_stream
        steps_of_layers = [int(m.num_steps) for n, m in model.named_modules()
                           if n.endswith("assigner.codebook")]  # fmt: skip
        found.append([int(stream.num_steps), steps_of_layers, float(stream.step_tokens.sum())])
    return found


@pytest.mark.parametrize("kind", ["by hand", "schedule", "synchronize"])
def test_the_step_ends_once_in_loops_of_others(kind: str, ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(foreign_loop, kind, 4)
    assert found == [[step, [step, step], 0.0] for step in (1, 2, 3, 4)]


def one_round(num_shards: int) -> list[torch.Tensor]:
    """In a rank: three rounds on this rank's part of 48 entries; the codes after each."""
    from megatron.core import parallel_state

    from vqmoe_megatron.moe.memory.vocabulary_round import Entries, gathered, moved_codes
    from vqmoe_megatron.vq.vocabulary_codes import assign

    embeddings, weights, ids, codes = drawn_entries()
    tp, found = parallel_state.get_tensor_model_parallel_group(), []
    for number in range(3):
        first = tp.rank() * 48 // num_shards
        own = slice(first, first + 48 // num_shards)
        mine = Entries(embeddings[own], weights[own], ids[own], first)
        codes = moved_codes(mine, codes, torch.tensor(number == 0), tp)
        ids = gathered(assign(embeddings[own], codes), tp)
        found += [codes, ids]
    return found


def drawn_entries():  # noqa: ANN201
    generator = torch.Generator().manual_seed(2)
    embeddings = torch.randn(48, 5, generator=generator)
    weights = torch.rand(48, generator=generator)
    weights[::4] = 0.0
    return embeddings, weights, torch.arange(48) % 7, torch.randn(7, 5, generator=generator)


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_rounds_over_shards_of_the_vocabulary_equal_the_oracle(num_shards: int, ranks) -> None:  # noqa: ANN001
    from vqmoe_megatron.vq.memory_oracle import oracle_round

    layout = {TP: num_shards}
    results = ranks(num_shards).run(one_round, num_shards, layout=layout)
    embeddings, weights, ids, codes = drawn_entries()
    their_ids, codes = ids.tolist(), codes.double()
    for number in range(3):
        codes, their_ids = oracle_round(
            embeddings.double(), weights.tolist(), their_ids, codes, number == 0
        )
        for found in results:
            torch.testing.assert_close(found[2 * number].double(), codes, rtol=1e-5, atol=1e-6)
            assert found[2 * number + 1].tolist() == their_ids
            assert torch.equal(found[2 * number], results[0][2 * number])  # bit by bit
