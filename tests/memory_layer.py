"""A layer with code memory on real ranks, and the oracle's memory of the same tokens.

S tokens a sequence, B sequences over all ranks and microbatches, V vocabulary entries, N experts.

Two microbatches are under way at once, as in a pipeline: both go forward before the first goes
backward, so rows of the wrong one would be seen.
"""

from __future__ import annotations

from typing import Any

import torch
from tiny_layer import (
    ACTIVATIONS,
    CUT,
    HIDDEN,
    NUM_EXPERTS,
    build_layer,
    draw_parameters,
    expert_place,
    join_experts,
)

from vqmoe_megatron.config import CodeMemoryConfig, VQConfig
from vqmoe_megatron.moe.context_cut import own_part
from vqmoe_megatron.vq.memory_oracle import oracle_context_means, oracle_memory, oracle_rows
from vqmoe_megatron.vq.oracle import OracleExperts, vqmoe_oracle

LENGTH = 8
NUM_SEQUENCES = 8
NUM_MICROBATCHES = 2
VOCABULARY = 24
VQ = {"path": "continuous", "codebook_update": "gradient", "init": "uniform"}
MEMORY = {"num_rows": 16, "codes": "embedding", "num_codes": 10, "max_order": 3, "context_dim": 5}


def vq_of(case: dict) -> VQConfig:
    return VQConfig(**{**VQ, "num_codes": 10, **case.get("vq", {})})


def memory_of(case: dict) -> CodeMemoryConfig:
    return CodeMemoryConfig(**{**MEMORY, **case.get("memory", {})})


def drawn(case: dict) -> dict[str, Any]:
    """Everything of all ranks, fp64: parameters, tokens, starts, x and the loss's weights."""
    memory, generator = memory_of(case), torch.Generator().manual_seed(3)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    parameters = draw_parameters(vq_of(case))
    rows_of_expert = memory.rows_per_layer // NUM_EXPERTS
    parameters["code_memory.weight"] = draw(NUM_EXPERTS, rows_of_expert, HIDDEN)
    if memory.gate == "token":
        parameters["memory_gate.linear.weight"] = draw(1, HIDDEN, scale=0.5)
        parameters["memory_gate.linear.bias"] = draw(1, scale=0.5)
    if memory.codes == "hidden":
        parameters["memory_assigner.codebook.codes"] = draw(1, memory.num_codes, HIDDEN)
    size = (NUM_SEQUENCES, LENGTH)
    starts = torch.rand(size, generator=generator) < 0.2
    starts[0] = False
    starts[1] = torch.arange(LENGTH) == LENGTH // 2  # a document begins at a shard's cut
    starts[2] = True  # every token is a document
    code_of_token = torch.randint(memory.num_codes, (VOCABULARY,), generator=generator)
    if case.get("tokens") == "one code":
        code_of_token[:] = 3
    return {
        "parameters": parameters,
        "tokens": torch.randint(VOCABULARY, size, generator=generator),
        "starts": starts,
        "code_of_token": code_of_token,
        "context_table": draw(VOCABULARY, memory.context_dim),
        "context_codes": draw(memory.num_context_codes, memory.context_dim),
        "x": draw(*size, HIDDEN),
        "weights": draw(*size, HIDDEN),
    }


def of_microbatch(tensor: torch.Tensor, number: int, group: Any) -> torch.Tensor:
    """Sequences ``[b, ...]`` that the ranks of one data-parallel rank see in a microbatch."""
    return tensor.chunk(NUM_MICROBATCHES)[number].chunk(group.size())[group.rank()]


def own_shard(sequences: torch.Tensor, tp: Any, cp: Any) -> torch.Tensor:
    """``[b, S, ...]`` -> this rank's ``[S / (CP * TP), b, ...]``."""
    part = own_part(sequences.transpose(0, 1), cp, 0)
    return part.chunk(tp.size())[tp.rank()].contiguous()


def build_memory_layer(case: dict, **changes: Any):  # noqa: ANN201
    """The layer with the drawn parameters and its stream with the drawn codes. In a rank only."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from vqmoe_megatron.moe.memory.code_stream import CodeStream
    from vqmoe_megatron.moe.memory.path import LayerMemory

    memory, everything = memory_of(case), drawn(case)

    def new_memory(config: Any) -> LayerMemory:
        stream = CodeStream(config, memory, VOCABULARY, get_default_pg_collection(), seed=5)
        return LayerMemory(memory, stream, seed=5)

    if case.get("recompute"):
        changes |= {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    layer = build_layer(vq_of(case), everything["parameters"], new_memory=new_memory, **changes)
    stream = layer.memory.stream.double()
    if memory.codes == "embedding":
        stream.code_of_token.copy_(everything["code_of_token"])
    if memory.num_context_codes:
        stream.context_table.copy_(everything["context_table"])
        stream.context_codes.copy_(everything["context_codes"])
    return layer, stream


def evaluate_memory_layer(case: dict) -> dict[str, Any]:
    """In a rank: forward twice, then backward twice; outputs, gradients and the codes used."""
    from megatron.core import parallel_state

    everything = drawn(case)
    layer, stream = build_memory_layer(case)
    dp, tp = parallel_state.get_data_parallel_group(), layer.pg_collection.tp
    cp = layer.pg_collection.cp
    outputs, inputs, losses, plans = [], [], [], []
    for number in range(NUM_MICROBATCHES):
        tokens, starts, x, weights = (
            of_microbatch(everything[name], number, dp)
            for name in ("tokens", "starts", "x", "weights")
        )
        stream.begin(own_part(tokens, cp, 1), own_part(starts, cp, 1))
        inputs.append(own_shard(x, tp, cp).requires_grad_())
        layer.start_ahead()
        output, _ = layer(inputs[-1])
        stream.follow_output(output)
        outputs.append(output.detach())
        losses.append((output * own_shard(weights, tp, cp)).sum())
        plan = stream.microbatches.current.plan
        plans.append([] if plan is None else [plan.is_table, plan.num_wanted])
    for loss in losses:
        loss.backward()
    layer.finish_table()
    return {
        "outputs": outputs,
        "x": [one.grad for one in inputs],
        "gradients": {n: p.grad for n, p in layer.named_parameters() if p.grad is not None},
        "trained": [n for n, p in layer.named_parameters() if p.requires_grad],
        "place": [dp.rank(), dp.size()],
        "positions": own_shard(torch.arange(LENGTH).unsqueeze(0), tp, cp).flatten(),
        "expert_place": expert_place(),
        "plans": plans,
        "code_of_token": stream.code_of_token,
    }


def gathered(results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Output and gradients of the whole world, in the order of :func:`drawn`."""
    found = {}
    for name, key in (("output", "outputs"), ("gradient of x", "x")):
        whole = torch.full((NUM_SEQUENCES, LENGTH, HIDDEN), torch.nan, dtype=torch.float64)
        for r in results:
            dp_rank, dp_size = r["place"]
            for number, part in enumerate(r[key]):
                sequences = whole.chunk(NUM_MICROBATCHES)[number].chunk(dp_size)[dp_rank]
                sequences[:, r["positions"]] = part.transpose(0, 1)
        found[name] = whole
    for name in results[0]["gradients"]:
        if name.startswith(CUT):
            cuts: dict[tuple[int, int], torch.Tensor] = {}
            for r in results:
                place = tuple(r["expert_place"])
                cuts[place] = cuts.get(place, 0.0) + r["gradients"][name]
            found[name] = join_experts(name, cuts)
        else:
            found[name] = torch.stack([r["gradients"][name] for r in results]).sum(dim=0)
    return found


def expected(case: dict, trained: list[str], code_of_token: torch.Tensor, dp_size: int):  # noqa: ANN201
    """The oracle's output and gradients of the same loss, by name, and the rows read."""
    everything, memory, vq = drawn(case), memory_of(case), vq_of(case)
    parameters = everything["parameters"]
    x = everything["x"].requires_grad_()
    for name in trained:
        parameters[name].requires_grad_()
    flat = x.flatten(0, 1)
    result = vqmoe_oracle(flat, parameters, vq, num_experts=NUM_EXPERTS)
    codes = code_of_token[everything["tokens"]]
    loss = result.vq_loss
    if memory.codes == "hidden":
        table = parameters["memory_assigner.codebook.codes"][0]
        nearest = [
            min(range(len(table)), key=lambda k, t=t: float((t - table[k].detach()).square().sum()))
            for t in flat.detach()
        ]
        codes = torch.tensor(nearest).view(codes.shape)
        chosen = table[codes.flatten()]
        commitment = (flat - chosen.detach()).square().mean()
        codebook = (flat.detach() - chosen).square().mean()
        loss = loss + vq.vq_loss_coeff * (codebook + vq.commitment_coeff * commitment)
    rows = []
    for tokens, starts, of_sequence in zip(
        everything["tokens"], everything["starts"].tolist(), codes, strict=True
    ):
        contexts = None
        if memory.num_context_codes:
            vectors = everything["context_table"][tokens]
            means = oracle_context_means(vectors, starts, memory.context_decay)
            distances = torch.cdist(means, everything["context_codes"])
            contexts = distances.argmin(dim=1).tolist()
        rows += oracle_rows(
            of_sequence.tolist(), starts, memory.num_rows, memory.max_order, contexts
        )
    expert = None
    if memory.values == "experts":
        expert = OracleExperts(parameters, ACTIVATIONS["gelu"], False)
    gate = None
    if memory.gate == "token":
        gate = (parameters["memory_gate.linear.weight"], parameters["memory_gate.linear.bias"])
    read = oracle_memory(flat, rows, parameters["code_memory.weight"], expert, gate)
    output = (result.output + read).view(x.shape)
    # VQ losses are means over the tokens of a rank's microbatch (test_layer_equality says more).
    total = (output * everything["weights"]).sum() + NUM_MICROBATCHES * dp_size * loss
    total.backward()
    found = {"output": output.detach(), "gradient of x": x.grad}
    return found | {name: parameters[name].grad for name in trained}, rows
