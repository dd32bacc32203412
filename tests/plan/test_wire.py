"""Sent bytes against a world of lists: every rank's rows are moved one by one and counted."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import product

import pytest
from layer_shapes import changed, shape
from list_world import Rank, World
from owners import owner_of_code, owner_rank

from vqmoe_megatron.plan.shape import LayerShape
from vqmoe_megatron.plan.wire import RowTraffic, Term, exact, layer_terms, summed, total_bytes


def test_whole_numbers_are_ints() -> None:
    assert type(exact(Fraction(6, 3))) is int and exact(Fraction(6, 3)) == 2
    assert type(exact(7)) is int and exact(7) == 7


def test_others_stay_as_they_are() -> None:
    assert exact(Fraction(1, 3)) == Fraction(1, 3)
    assert type(exact(Fraction(1, 3))) is Fraction


LAYER = shape(num_local_tokens=10, hidden_size=12, moe_ffn_hidden_size=8, num_moe_experts=8)


def forward_bytes(terms: tuple[Term, ...]) -> int | Fraction:
    return total_bytes(term for term in terms if not term.is_backward)


def backward_bytes(terms: tuple[Term, ...]) -> int | Fraction:
    return total_bytes(term for term in terms if term.is_backward)


def boxes_by_owner(world: World, owners: dict[Rank, list[int]]) -> dict[Rank, list[list]]:
    """Name every row (rank, index) and put it into the box of its owner."""
    boxes: dict[Rank, list[list]] = {
        rank: [[] for _ in range(world.num_ranks)] for rank in world.ranks
    }
    for rank, of_rows in owners.items():
        for index, owner in enumerate(of_rows):
            boxes[rank][owner].append((rank, index))
    return boxes


def traffic_of(world: World, owners: dict[Rank, list[int]], rank: Rank) -> RowTraffic:
    p, e = rank
    received = {
        (q, shard): sum(owners[source, shard].count(q) for source in range(world.num_ranks))
        for q, shard in world.ranks
    }
    return RowTraffic(
        num_rows_sent=len(owners[rank]) - owners[rank].count(p),
        num_rows_received=received[p, e] - owners[rank].count(p),
        largest_gathered_rows=max(received[p, shard] for shard in range(world.num_shards)),
    )


def check(world: World, layer: LayerShape, owners: dict, back_owners: dict | None = None) -> None:
    for rank in world.ranks:
        terms = layer_terms(
            layer,
            traffic_of(world, owners, rank) if owners else None,
            traffic_of(world, back_owners, rank) if back_owners else None,
        )
        assert forward_bytes(terms) == world.sent[rank, False]
        assert backward_bytes(terms) == world.sent[rank, True]
        assert total_bytes(terms) == world.sent[rank, False] + world.sent[rank, True]


def draw_owners(world: World, num_rows: int, seed: int, skew: float = 3.0) -> dict[Rank, list[int]]:
    """Experts of every rank's rows, drawn unevenly; each rank's rows by owner."""
    generator = random.Random(seed)
    experts = range(LAYER.num_moe_experts)
    weights = [1.0 / (1 + e) ** skew for e in experts]
    return {
        rank: [
            owner_rank(e, LAYER.num_moe_experts, world.num_ranks)
            for e in generator.choices(experts, weights, k=num_rows)
        ]
        for rank in world.ranks
    }


def run_dispatch(world: World, layer: LayerShape, owners: dict, has_input_gradient: bool) -> None:
    row_bytes = layer.hidden_size * layer.bytes_per_element
    boxes = boxes_by_owner(world, owners)
    world.is_backward = False
    world.exchange_counts(layer.num_moe_experts)
    for is_backward in (False, True):
        world.is_backward = is_backward
        rows, split, sizes = world.to_owners(boxes, row_bytes)
        if is_backward and not has_input_gradient:
            continue
        assert world.from_owners(rows, split, sizes, row_bytes) == boxes  # all rows came home


@pytest.mark.parametrize(("ranks", "shards"), list(product((1, 2, 4, 8), (1, 2, 4))))
@pytest.mark.parametrize("seed", [0, 1])
def test_token_dispatch_of_uneven_rows(ranks: int, shards: int, seed: int) -> None:
    layer = changed(
        LAYER, moe_router_topk=2, bytes_per_element=2, expert_model_parallel_size=ranks,
        expert_tensor_parallel_size=shards,
    )  # fmt: skip
    world = World(ranks, shards)
    owners = draw_owners(world, layer.num_dispatched_rows, seed)
    run_dispatch(world, layer, owners, has_input_gradient=True)
    check(world, layer, owners)


def test_rows_without_gradient_bring_none_back() -> None:
    layer = changed(
        LAYER, path="discrete", norm="none", straight_through="identity",
        expert_model_parallel_size=4, expert_tensor_parallel_size=2,
    )  # fmt: skip
    world = World(4, 2)
    owners = draw_owners(world, layer.num_dispatched_rows, seed=2)
    run_dispatch(world, layer, owners, has_input_gradient=False)
    check(world, layer, owners)


def test_idle_owners_still_exchange_counts() -> None:
    layer = changed(LAYER, expert_model_parallel_size=4, path="continuous")
    world = World(4, 1)
    owners = {rank: [0] * 10 for rank in world.ranks}  # all rows to rank 0
    run_dispatch(world, layer, owners, has_input_gradient=True)
    check(world, layer, owners)
    # rank 3 sends 3 blocks of 2 counts, its 10 rows, and nothing back; then 10 rows of gradients
    terms = layer_terms(layer, traffic_of(world, owners, (3, 0)))
    assert (forward_bytes(terms), backward_bytes(terms)) == (3 * 2 * 8 + 10 * 48, 10 * 48)


def run_table(world: World, layer: LayerShape) -> None:
    """Walk over the slots of every rank: summed over shards, to all; the sums per code back."""
    owned = [0] * world.num_ranks
    for row in range(layer.vq.num_code_slices * layer.vq.num_codes):
        owned[owner_of_code(row, layer.num_moe_experts, world.num_ranks)] += 1
    num_slots, width = max(owned), layer.hidden_size
    block_bytes = num_slots * width * layer.bytes_per_element
    world.is_backward = False
    world.ring_all_reduce(block_bytes, world.num_shards)
    for is_backward, element_bytes in ((False, layer.bytes_per_element), (True, 4)):
        world.is_backward = is_backward
        for p, e in world.ranks:
            for other in range(world.num_ranks):
                for _slot in range(num_slots):
                    world._send((p, e), width * element_bytes if other != p else 0, 1)
    world.ring_all_reduce(block_bytes, world.num_shards)


def run_token_gradients(world: World, layer: LayerShape, owners: dict) -> None:
    world.is_backward = True
    world.exchange_counts(world.num_ranks * layer.num_slots)
    boxes = boxes_by_owner(world, owners)
    b = layer.bytes_per_element
    rows, split, sizes = world.to_owners(boxes, layer.hidden_size * b)
    width = layer.hidden_size
    if layer.vq.code_input == "codebook":
        width = len(range(0, layer.hidden_size, layer.vq.num_code_slices))
    assert world.from_owners(rows, split, sizes, width * b) == boxes


@pytest.mark.parametrize(("ranks", "shards"), list(product((1, 2, 4), (1, 2, 4))))
@pytest.mark.parametrize("path", ["dual", "discrete"])
@pytest.mark.parametrize(
    "changes",
    [
        {"straight_through": "none", "num_codes": 13},
        {"straight_through": "identity", "num_codes": 13, "bytes_per_element": 2},
        {"straight_through": "token", "num_codes": 5, "num_code_slices": 3},
        {"straight_through": "token", "num_codes": 5, "num_code_slices": 3,
         "code_input": "learned", "bytes_per_element": 2},
    ],
)  # fmt: skip
def test_code_space(ranks: int, shards: int, path: str, changes: dict) -> None:
    layer = changed(
        LAYER, execution="code_space", path=path, expert_model_parallel_size=ranks,
        expert_tensor_parallel_size=shards, **changes,
    )  # fmt: skip
    world = World(ranks, shards)
    owners, back_owners = {}, {}
    if path == "dual":
        owners = draw_owners(world, layer.num_continuous_rows, seed=3)
        run_dispatch(world, layer, owners, has_input_gradient=True)
    run_table(world, layer)
    if layer.vq.straight_through == "token":
        back_owners = draw_owners(world, layer.num_discrete_rows, seed=4)
        run_token_gradients(world, layer, back_owners)
    check(world, layer, owners, back_owners)


@pytest.mark.parametrize(("ranks", "shards", "tensor"), list(product((1, 2, 4), (1, 2), (1, 2))))
def test_group_gradients(ranks: int, shards: int, tensor: int) -> None:
    layer = changed(
        LAYER, execution="code_space", path="discrete", straight_through="group", num_codes=13,
        num_code_slices=3, expert_model_parallel_size=ranks, expert_tensor_parallel_size=shards,
        tensor_model_parallel_size=tensor, bytes_per_element=2,
    )  # fmt: skip
    world = World(ranks, shards)
    run_table(world, layer)
    world.is_backward = True
    num_slots = layer.num_slots
    world.ring_all_reduce(ranks * num_slots * 13 * 4, tensor)  # 12 columns and the count
    boxes = {
        rank: [[(rank, q, slot) for slot in range(num_slots)] for q in range(ranks)]
        for rank in world.ranks
    }
    world.exchange_counts(ranks * num_slots)
    b = layer.bytes_per_element  # the means are rounded to the rows' type
    rows, split, sizes = world.to_owners(boxes, 12 * b)
    assert world.from_owners(rows, split, sizes, 4 * b) == boxes  # 12 / 3 columns come back
    check(world, layer, {})


@pytest.mark.parametrize("tensor", [1, 2])
def test_group_gradients_by_tokens(tensor: int) -> None:
    layer = changed(
        LAYER, straight_through="group", num_codes=13, num_code_slices=3,
        expert_model_parallel_size=2, tensor_model_parallel_size=tensor, bytes_per_element=2,
    )  # fmt: skip
    world = World(2, 1)
    owners = draw_owners(world, layer.num_dispatched_rows, seed=5)
    run_dispatch(world, layer, owners, has_input_gradient=True)
    for _slice in range(3):
        world.ring_all_reduce(13 * 13 * 4, tensor)  # 13 codes; 12 columns and the count
    check(world, layer, owners)
    blend = changed(layer, expert_input="blend", straight_through="token")  # its own gradient
    assert "tp" not in {term.axis for term in layer_terms(blend)}


def test_terms_name_their_collectives() -> None:
    layer = changed(
        LAYER, execution="code_space", straight_through="token", num_codes=16,
        expert_model_parallel_size=2, expert_tensor_parallel_size=2,
    )  # fmt: skip
    terms = layer_terms(layer)
    assert [(t.part, "bwd" if t.is_backward else "fwd", t.collective, t.axis) for t in terms] == [
        ("counts", "fwd", "all_to_all", "ep"),
        ("counts", "fwd", "all_gather", "expt_tp"),
        ("rows", "fwd", "all_to_all", "ep"),
        ("rows", "fwd", "all_gather", "expt_tp"),
        ("rows", "fwd", "reduce_scatter", "expt_tp"),
        ("rows", "fwd", "all_to_all", "ep"),
        ("rows", "bwd", "all_to_all", "ep"),
        ("rows", "bwd", "all_gather", "expt_tp"),
        ("rows", "bwd", "reduce_scatter", "expt_tp"),
        ("rows", "bwd", "all_to_all", "ep"),
        ("table", "fwd", "all_reduce", "expt_tp"),
        ("table", "fwd", "all_gather", "ep"),
        ("table", "bwd", "reduce_scatter", "ep"),
        ("table", "bwd", "all_reduce", "expt_tp"),
        ("straight_through", "bwd", "all_to_all", "ep"),
        ("straight_through", "bwd", "all_gather", "expt_tp"),
        ("straight_through", "bwd", "all_to_all", "ep"),
        ("straight_through", "bwd", "all_gather", "expt_tp"),
        ("straight_through", "bwd", "reduce_scatter", "expt_tp"),
        ("straight_through", "bwd", "all_to_all", "ep"),
    ]


def test_hand_computed_tokens() -> None:
    # 10 tokens, one row of each path: 20 rows of 48 bytes, half of them away, 8 counts of 8 bytes
    terms = layer_terms(changed(LAYER, expert_model_parallel_size=2))
    assert forward_bytes(terms) == 4 * 8 + 10 * 48 + 10 * 48 == 992
    assert backward_bytes(terms) == 960
    assert all(type(term.sent_bytes) is int for term in terms)


def test_hand_computed_code_space() -> None:
    # 16 codes on 4 ranks: 4 slots of 12 fp64 elements, sums as wide
    layer = changed(
        LAYER, execution="code_space", path="discrete", straight_through="none", num_codes=16,
        expert_model_parallel_size=4, bytes_per_element=8,
    )  # fmt: skip
    terms = layer_terms(layer)
    assert (forward_bytes(terms), backward_bytes(terms)) == (3 * 4 * 96, 3 * 4 * 96)


def test_one_rank_sends_nothing() -> None:
    for execution, straight_through in product(("tokens", "code_space"), ("token", "group")):
        layer = changed(LAYER, execution=execution, straight_through=straight_through)
        assert layer_terms(layer) == ()
        assert total_bytes(layer_terms(layer)) == 0


def test_amounts_are_exact() -> None:
    # 10 rows over 4 ranks: 7.5 leave; 4 shards reduce 8 * 12 fp16 elements by 3 / 2 of their bytes
    layer = changed(LAYER, path="continuous", expert_model_parallel_size=4)
    rows = [t.sent_bytes for t in layer_terms(layer) if t.part == "rows"]
    assert rows == [360] * 4 and all(type(amount) is int for amount in rows)
    assert RowTraffic.balanced(10, 4) == RowTraffic(Fraction(15, 2), Fraction(15, 2), 10)
    shards = changed(
        LAYER, execution="code_space", path="discrete", straight_through="none", num_codes=8,
        hidden_size=5, moe_ffn_hidden_size=9, expert_tensor_parallel_size=3, bytes_per_element=2,
    )  # fmt: skip
    assert forward_bytes(layer_terms(shards)) == Fraction(8 * 40, 3)


def test_a_table_per_step_is_exchanged_once() -> None:
    layer = changed(
        LAYER, execution="code_space", straight_through="token", num_codes=16,
        expert_model_parallel_size=4, expert_tensor_parallel_size=2, table_per_step=True,
    )  # fmt: skip
    once, every = layer_terms(layer), layer_terms(changed(layer, table_per_step=False))
    assert total_bytes(every, 8) == 8 * total_bytes(every)
    assert total_bytes(once) == total_bytes(once, 1) == total_bytes(every, 1)
    # 4 slots * 12 elements * 4 bytes: gathered and reduced over 4 ranks, all-reduced over 2 shards
    assert total_bytes(every, 8) - total_bytes(once, 8) == 7 * (2 * 3 + 2 * 1) * 192


def test_low_dim_gradients_travel_back_as_narrow_fp32() -> None:
    # 2 ranks, 10 tokens: 5 rows to the other rank, 5 rows of it back
    layer = changed(
        LAYER, execution="code_space", path="discrete", bytes_per_element=2, code_dim=4,
        expert_model_parallel_size=2,
    )  # fmt: skip

    def rows(layer: LayerShape) -> list:
        terms = [t for t in layer_terms(layer) if t.part == "straight_through"]
        return [t.sent_bytes for t in terms][1:]  # behind the counts

    assert rows(layer) == [5 * 12 * 2, 5 * 4 * 4]
    assert rows(changed(layer, code_input="learned")) == [5 * 12 * 2, 5 * 12 * 2]
    assert rows(changed(layer, code_dim=None)) == [5 * 12 * 2, 5 * 12 * 2]


def test_code_space_beats_tokens_where_tokens_outnumber_codes() -> None:
    base = shape(
        num_local_tokens=4096, hidden_size=1024, moe_ffn_hidden_size=2048, num_moe_experts=16,
        num_codes=64, expert_model_parallel_size=4, path="discrete", straight_through="none",
        bytes_per_element=2,
    )  # fmt: skip
    for element_bytes in (2, 4):
        tokens = changed(base, bytes_per_element=element_bytes)
        code_space = layer_terms(changed(tokens, execution="code_space"))
        assert 40 * total_bytes(code_space) <= total_bytes(layer_terms(tokens))
        assert 40 * forward_bytes(code_space) <= forward_bytes(layer_terms(tokens))


def test_terms_of_a_key_are_summed_in_the_order_in_which_they_come() -> None:
    terms = (
        Term("b", "send", "pp", Fraction(1, 2), 3),
        Term("a", "send", "pp", 5, is_once_per_step=True),
        Term("b", "send", "pp", Fraction(1, 2)),
    )
    assert list(summed(terms, lambda t: t.part, 2).items()) == [("b", (8, 2)), ("a", (1, 5))]
    assert (total_bytes(terms), total_bytes(terms, 2), total_bytes(())) == (6, 7, 0)
    assert type(total_bytes(terms)) is int


TOKENS = 4096
LARGE = shape(  # many ranks, wide rows: what is left of a row is its size
    num_local_tokens=TOKENS, hidden_size=4096, moe_ffn_hidden_size=1024, num_moe_experts=64,
    expert_model_parallel_size=64, path="discrete", straight_through="none",
)  # fmt: skip


def by_both(layer: LayerShape) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """Terms by tokens and in code space."""
    by_tokens = changed(layer, execution="tokens", table_per_step=False)
    return layer_terms(by_tokens), layer_terms(changed(layer, execution="code_space"))


@pytest.mark.parametrize(
    ("changes", "measure", "break_even"),
    [
        ({}, forward_bytes, Fraction(2)),
        ({"bytes_per_element": 2}, forward_bytes, Fraction(2)),
        ({"bytes_per_element": 2}, total_bytes, Fraction(4, 3)),  # bf16 rows, fp32 sums
        ({}, total_bytes, Fraction(2)),  # sums as wide as rows
        # 2 T rows less, K (b + 4) bytes more: the sums per code are exchanged beside the rows
        ({"straight_through": "token"}, total_bytes, Fraction(1)),
        ({"straight_through": "token", "bytes_per_element": 2}, total_bytes, Fraction(2, 3)),
        ({"path": "dual"}, forward_bytes, Fraction(2)),  # the other path is common
    ],
)
def test_break_even_of_large_layers(changes: dict, measure, break_even: Fraction) -> None:
    """Up to ``break_even`` codes per token code space sends no more than tokens do."""
    for offset, wins in ((-64, True), (128, False)):  # a table grows by whole rounds over experts
        num_codes = int(break_even * TOKENS) // 64 * 64 + offset
        tokens, code_space = by_both(changed(LARGE, num_codes=num_codes, **changes))
        assert (measure(code_space) <= measure(tokens)) is wins


def test_code_space_at_twice_the_break_even_sends_twice_as_much() -> None:
    tokens, code_space = by_both(changed(LARGE, num_codes=4 * TOKENS))
    assert float(forward_bytes(code_space) / forward_bytes(tokens)) == pytest.approx(2, rel=1e-3)


def test_straight_through_without_sums_per_code_would_break_even_at_2_tokens() -> None:
    """The design's table has the owner form the sums from the rows that it gets anyway."""
    tokens, code_space = by_both(changed(LARGE, straight_through="token", num_codes=2 * TOKENS))
    without = [term for term in code_space if term.collective != "reduce_scatter"]
    assert float(total_bytes(without) / total_bytes(tokens)) == pytest.approx(1.0, abs=1e-3)


def test_a_table_costs_more_than_the_counts_of_no_tokens() -> None:
    # one row of the table per rank against one count per pair of ranks
    no_tokens = changed(LARGE, num_local_tokens=0, hidden_size=64, num_codes=64)
    tokens, code_space = by_both(no_tokens)
    assert total_bytes(code_space) > total_bytes(tokens)


def test_a_table_per_step_pays_for_as_many_more_codes_as_there_are_microbatches() -> None:
    for times, offset, wins in ((1, -64, True), (1, 128, False), (8, -64, True), (8, 512, False)):
        layer = changed(LARGE, num_codes=2 * TOKENS * times + offset, table_per_step=False)
        layer = changed(layer, execution="code_space", table_per_step=times > 1)
        tokens, code_space = by_both(layer)
        assert (total_bytes(code_space, 8) <= total_bytes(tokens, 8)) is wins


def test_counted_rows_take_the_place_of_balanced_ones() -> None:
    counted = RowTraffic(num_rows_sent=5, num_rows_received=7, largest_gathered_rows=0)
    layer = changed(LAYER, num_moe_experts=4, expert_model_parallel_size=2, path="continuous")
    terms = layer_terms(layer, counted)
    # 1 block of 2 counts; rows of 48 bytes: 5 out and 7 back, forward and backward
    assert total_bytes(terms) == 16 + 2 * (5 + 7) * 48
    assert total_bytes(terms, 3) == 3 * (16 + 2 * 12 * 48)


@pytest.mark.parametrize("tensor_ranks", [1, 2, 4])
def test_a_shared_expert_gathers_and_scatters_the_sequence(tensor_ranks: int) -> None:
    layer = changed(
        LAYER, path="continuous", tensor_model_parallel_size=tensor_ranks,
        moe_shared_expert_intermediate_size=8,
    )  # fmt: skip
    block = (tensor_ranks - 1) * 10 * 12 * 4
    found = [(t.is_backward, t.collective, t.axis, t.sent_bytes) for t in layer_terms(layer)]
    found = [term for term in found if term[2] == "tp"]
    if tensor_ranks == 1:
        assert found == []
        return
    assert sorted(found) == [
        (False, "all_gather", "tp", block),
        (False, "reduce_scatter", "tp", block),
        (True, "all_gather", "tp", block),
        (True, "all_gather", "tp", block),
        (True, "reduce_scatter", "tp", block),
    ]
