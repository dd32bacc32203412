"""Replicas of a model in training agree to the bit, and one flipped bit is found and named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from replica_damage import check_in_training
from small_run import PARITY, TINY, layout_overrides

from vqmoe_megatron.train import replica_check
from vqmoe_megatron.train.replica_check import Piece, compare_fingerprints, fingerprint

TP, PP, EP = (f"{name}_model_parallel_size" for name in ("tensor", "pipeline", "expert"))
OVERLAP = [
    f"optimizer.{name}=true"
    for name in ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
]
EMBEDDING = "embedding.word_embeddings.weight [0, 0]"
NORM = "decoder.layers.1.input_layernorm.weight [1, 0]"
CODEBOOK = [
    f"decoder.layers.1.mlp.assigner.{name}"
    for name in (
        "codebook.codes [1, 0, 0, 0]",
        "codebook.usage [1, 0, 0]",
        "codebook.ema_sum [1, 0, 0, 0]",
        "codebook.num_steps [1]",
        "code_map.expert_of_row [1, 0]",
    )
]
EXPERTS = [f"decoder.layers.0.mlp.experts.experts.linear_fc1.weight [0, {e}, 0, 0]" for e in (0, 4)]
MEMORY = [
    "code_memory.num_rows=64",
    "code_memory.codes=embedding",
    "code_memory.num_codes=100",
    "code_memory.num_context_codes=4",
]
STREAM = ["code_stream.code_of_token [0]", "code_stream.context_table [0, 0]"]
OWN_STREAM = ["code_stream.codes [0, 0]", "code_stream.contexts.codes [0, 0, 0]"]
ROWS = [f"decoder.layers.0.mlp.code_memory.weight [0, {e}, 0, 0]" for e in (0, 4)]
# layout, overrides, how many ranks hold what
HEALTHY = {
    "tp2": (2, {TP: 2}, [], {2: [NORM, *CODEBOOK, EXPERTS[0]], 1: [EMBEDDING]}),
    "ep2-dp2": (4, {EP: 2}, [], {4: [NORM, *CODEBOOK, EMBEDDING], 2: EXPERTS}),
    "pp2": (2, {PP: 2}, [], {1: [NORM, *CODEBOOK, EMBEDDING, EXPERTS[0]]}),
    "pp2-tied": (
        2,
        {PP: 2},
        ["model.untie_embeddings_and_output_weights=false"],
        {1: [NORM, *CODEBOOK], 2: [EMBEDDING]},
    ),
    "memory-pp2": (2, {PP: 2}, MEMORY, {2: STREAM, 1: [*OWN_STREAM, ROWS[0]]}),
    "memory-ep2-dp2": (4, {EP: 2}, MEMORY, {4: [*STREAM, *OWN_STREAM], 2: ROWS}),
    "overlap": (2, {}, OVERLAP, {2: [NORM, *CODEBOOK, EMBEDDING, EXPERTS[0]]}),
}


def run(pool, corpus, folder, overrides, layout, damages=()) -> list[dict]:
    every = [*TINY, f"data.path={corpus}", f"train.output_dir={folder}", *overrides]
    every += layout_overrides(layout)
    return pool.run(check_in_training, str(PARITY), every, list(damages), layout=layout)


@pytest.mark.distributed
@pytest.mark.parametrize("name", HEALTHY)
def test_replicas_of_a_healthy_run_agree(name, ranks, small_corpus, tmp_path):
    num_ranks, layout, overrides, expected = HEALTHY[name]
    results = run(ranks(num_ranks), small_corpus, tmp_path, overrides, layout)
    pieces = [result["before_gather"] for result in results]
    for num_holders, names in expected.items():
        for piece in names:
            assert sum(piece in held for held in pieces) == num_holders, piece
    every = set().union(*pieces)
    num_shared = sum(sum(piece in held for held in pieces) > 1 for piece in every)
    assert [result["compared"] for result in results] == [num_shared] * num_ranks
    if name == "pp2":
        assert num_shared == 0
    if name == "pp2-tied":
        assert num_shared == 1
    # Overlapped shards are stale until gathered: without that the check would cry wolf.
    stale = [p for p in every if len({held[p] for held in pieces if p in held}) > 1]
    assert bool(stale) == (name == "overlap")


@pytest.mark.distributed
def test_one_flipped_bit_is_named_on_every_rank(ranks, small_corpus, tmp_path):
    damages = [
        [3, "layers.1.mlp.assigner.codebook.codes", 17],
        [2, "layers.0.mlp.experts.weight1", 5],
        [0, "layers.1.mlp.assigner.code_map.expert_of_row", 3],
    ]
    results = run(ranks(4), small_corpus, tmp_path, [], {EP: 2}, damages)
    assert all(result["messages"] == results[0]["messages"] for result in results)
    codes, experts, code_map = results[0]["messages"]
    head, title, row = codes.splitlines()
    assert head == (
        "replicas differ at iteration 2: 1 piece (1 codebook), first "
        "decoder.layers.1.mlp.assigner.codebook.codes; rank 3 differs from ranks 0 1 2"
    )
    assert title.split() == "kind piece offset shape ranks that agree: fingerprint".split()
    assert row.startswith("codebook  decoder.layers.1.mlp.assigner.codebook.codes  [1, 0, 0, 0]")
    assert "  [1, 16, 32]  ranks 0 1 2: " in row and "; rank 3: " in row
    # Experts 0-3 live on ranks 0 and 2 only.
    assert (
        "1 piece (1 expert), first decoder.layers.0.mlp.experts.experts.linear_fc1.weight; "
        "rank 2 differs from rank 0\n"
    ) in experts
    assert "first decoder.layers.1.mlp.assigner.code_map.expert_of_row; rank 0 differs" in code_map


@pytest.mark.distributed
def test_a_norm_and_a_tied_embedding_are_replicas_too(ranks, small_corpus, tmp_path):
    norm = [[1, "layers.1.input_layernorm.weight", 0]]
    for result in run(ranks(2), small_corpus, tmp_path / "tp", [], {TP: 2}, norm):
        (message,) = result["messages"]
        assert "1 piece (1 parameter), first decoder.layers.1.input_layernorm.weight; " in message
        assert "rank 1 differs from rank 0" in message
    tied = [[0, "embedding.word_embeddings.weight", 40]]
    overrides = HEALTHY["pp2-tied"][2]
    for result in run(ranks(2), small_corpus, tmp_path / "pp", overrides, {PP: 2}, tied):
        assert "first embedding.word_embeddings.weight; rank 1 differs" in result["messages"][0]


# The fingerprint


def slow_fingerprint(tensor: torch.Tensor) -> list[int]:
    """The tree of weighted sums with Python's integers."""
    kind = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[tensor.element_size()]
    numbers = np.frombuffer(bytes(tensor.flatten().view(torch.uint8).tolist()), kind).tolist()
    result = []
    for weights in replica_check._weights(torch.device("cpu")).tolist():
        level = numbers
        while True:
            rows = [
                level[i : i + replica_check.ROW] for i in range(0, len(level), replica_check.ROW)
            ]
            level = [sum(x * w for x, w in zip(row, weights, strict=False)) for row in rows]
            if len(level) == 1:
                break
        result.append((level[0] + 2**63) % 2**64 - 2**63)
    return result


@pytest.mark.parametrize("num_elements", [1, 2, 65536, 65537, 200_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_it_is_the_tree_of_weighted_sums(num_elements, dtype):
    generator = torch.Generator().manual_seed(num_elements)
    tensor = (torch.randn(num_elements, generator=generator) * 3).to(dtype)
    assert fingerprint(tensor).tolist() == slow_fingerprint(tensor)


def test_it_is_the_same_for_views_and_in_blocks(monkeypatch):
    tensor = torch.randn(3, 100_000)
    expected = fingerprint(tensor)
    assert torch.equal(fingerprint(tensor.t().contiguous().t()), expected)
    monkeypatch.setitem(replica_check.BLOCK_ROWS, "cpu", 3)  # several rows at once, as on a GPU
    assert torch.equal(fingerprint(tensor), expected)


def test_any_bit_counts():
    tensor = torch.randn(70_000)
    expected = fingerprint(tensor).tolist()
    for element in (0, 65_535, 65_536, 69_999):
        for bit in (0, 22, 30, 31):
            flipped = tensor.clone()
            flipped.view(torch.int32)[element] ^= -(2**31) if bit == 31 else 1 << bit
            found = fingerprint(flipped).tolist()
            assert found[0] != expected[0] and found[1] != expected[1]
    one = torch.tensor(7)
    assert fingerprint(one).tolist() != fingerprint(one + 1).tolist()
    assert fingerprint(torch.zeros(0)).tolist() == [0, 0]


def test_signs_order_and_nan_payloads_count():
    tensor = torch.arange(1.0, 70_001.0)
    variants = {
        "itself": tensor,
        "two signs": torch.cat([-tensor[:2], tensor[2:]]),
        "all signs": -tensor,
        "two swapped": torch.cat([tensor[1:2], tensor[:1], tensor[2:]]),
        "reversed": tensor.flip(0),
        "moved by a row": tensor.roll(replica_check.ROW),
        "zero": torch.zeros(70_000),
        "minus zero": -torch.zeros(70_000),
    }
    for payload in (0x7FC00000, 0x7FC00001):
        bits = tensor.view(torch.int32).clone()
        bits[5] = payload
        variants[f"NaN {payload}"] = bits.view(torch.float32)
    found = {tuple(fingerprint(variant).tolist()) for variant in variants.values()}
    assert len(found) == len(variants)


# The message


def test_many_differing_pieces_are_cut_and_codebooks_come_first():
    pieces = [Piece("decoder.layers.mlp.router.weight", (n, 0, 0), (8, 4)) for n in range(24)]
    pieces.append(Piece("decoder.layers.mlp.assigner.codebook.usage", (11, 0, 0), (1, 16)))
    pieces.append(Piece("decoder.final_layernorm.weight", (0,), (4,)))  # the same everywhere
    gathered = [
        {piece: "same" if "final" in piece.key else f"{rank // 2}" * 32 for piece in pieces}
        for rank in range(6)
    ]
    gathered[5].popitem()
    text, num_compared = compare_fingerprints(gathered, 120)
    assert num_compared == 26
    lines = text.splitlines()
    assert lines[0] == (
        "replicas differ at iteration 120: 25 pieces (1 codebook, 24 parameter), first "
        "decoder.layers.11.mlp.assigner.codebook.usage; ranks 2-5 differ from ranks 0 1"
    )
    assert len(lines) == 2 + 20 + 1 and lines[-1] == "and 5 more"
    assert lines[2].startswith("codebook ") and lines[3].split()[1].startswith("decoder.layers.0.")
    order = [line.split()[1].split(".")[2] for line in lines[3:-1]]
    assert order == [str(n) for n in range(19)]  # 10 after 9
    assert "ranks 0 1: 00000000..; ranks 2 3: 11111111..; ranks 4 5: 22222222.." in lines[2]


def test_agreement_has_no_message():
    piece = Piece("output_layer.weight", (0, 0), (4, 4))
    assert compare_fingerprints([{piece: "a"}, {piece: "a"}, {}], 1) == (None, 1)
    assert compare_fingerprints([{piece: "a"}], 1) == (None, 0)
