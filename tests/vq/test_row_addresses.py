"""Row ids: equal to Python integers token by token, within documents, spread over owners."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from vqmoe_megatron.vq.memory_oracle import oracle_rows, split_mix
from vqmoe_megatron.vq.row_addresses import mix, row_ids, shifted, tokens_before

NUM_ROWS = 64


def drawn(num_sequences: int, length: int, num_codes: int = 50, share_of_starts: float = 0.2):  # noqa: ANN201
    generator = torch.Generator().manual_seed(length)
    size = (num_sequences, length)
    codes = torch.randint(num_codes, size, generator=generator)
    contexts = torch.randint(7, size, generator=generator)
    return codes, torch.rand(size, generator=generator) < share_of_starts, contexts


def test_mix_is_split_mix() -> None:
    """The first outputs of SplitMix64 with seed 0 are published; ours lacks the highest bit."""
    golden = 0x9E3779B97F4A7C15
    assert [split_mix(n * golden) for n in (1, 2, 3)] == [
        published % 2**63
        for published in (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    ]
    numbers = [0, 1, -1, 2**62, -(2**63), 2**63 - 1, 123456789, -987654321]
    assert mix(torch.tensor(numbers)).tolist() == [split_mix(number) for number in numbers]


@pytest.mark.parametrize("max_order", [1, 2, 3, 8])
@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 20), (2, 5)], ids=str)
def test_equals_the_oracle(max_order: int, with_context: bool, size: tuple[int, int]) -> None:
    codes, starts, contexts = drawn(*size)
    chosen = contexts if with_context else None
    found = row_ids(codes, starts, NUM_ROWS, max_order, chosen)
    num_addresses = max_order + 2 * with_context
    assert found.shape == (*size, num_addresses) and found.dtype == torch.int64
    assert 0 <= int(found.min()) and int(found.max()) < num_addresses * NUM_ROWS
    for sequence in range(size[0]):
        expected = oracle_rows(
            codes[sequence].tolist(),
            starts[sequence].tolist(),
            NUM_ROWS,
            max_order,
            contexts[sequence].tolist() if with_context else None,
        )
        assert found[sequence].tolist() == expected


def test_a_document_is_read_as_if_it_stood_alone() -> None:
    codes, _, contexts = drawn(1, 12)
    starts = torch.zeros(1, 12, dtype=torch.bool)
    starts[0, [5, 6]] = True
    whole = row_ids(codes, starts, NUM_ROWS, 4, contexts)
    for first, end in ((0, 5), (5, 6), (6, 12)):
        cut = slice(first, end)
        alone = row_ids(codes[:, cut], starts[:, cut] & False, NUM_ROWS, 4, contexts[:, cut])
        assert torch.equal(whole[:, cut], alone)
    unbroken = row_ids(codes, starts & False, NUM_ROWS, 4, contexts)
    assert not torch.equal(whole[:, 5:9, :4], unbroken[:, 5:9, :4])
    assert torch.equal(whole[:, :5], unbroken[:, :5])  # nothing is read ahead
    assert torch.equal(whole[:, 9:], unbroken[:, 9:])  # nor further back than the order


def test_tokens_before_and_shifted_by_hand() -> None:
    starts = torch.tensor([[False, False, True, True, False, False], [True] * 6])
    before = tokens_before(starts)
    assert before.tolist() == [[0, 1, 0, 0, 1, 2], [0] * 6]
    codes = torch.tensor([[10, 11, 12, 13, 14, 15]] * 2)
    assert shifted(codes, before, 1).tolist() == [[0, 11, 0, 0, 14, 15], [0] * 6]
    assert shifted(codes, before, 9).tolist() == [[0] * 6] * 2  # longer than the sequence


def test_orders_and_histories_do_not_share_rows_by_chance() -> None:
    """Two codes are told apart, also in their order, and a row of one order is no other's."""
    pairs = torch.tensor([[a, b] for a in range(16) for b in range(16)])
    num_rows = 2**20
    rows = row_ids(pairs, torch.zeros_like(pairs, dtype=torch.bool), num_rows, 3)[:, 1]
    assert rows[:, 1].unique().numel() == 256
    assert len(set(rows[:, 0].tolist()) & set(rows[:, 1].tolist())) == 0
    assert len(set(rows[:, 1].tolist()) & set(rows[:, 2].tolist())) == 0


@pytest.mark.parametrize("num_experts", [2, 4, 8, 3, 5])
@pytest.mark.parametrize("max_order", [1, 2, 3, 4, 8])
def test_every_order_reads_rows_of_all_experts_alike(num_experts: int, max_order: int) -> None:
    """Also where A and N have a common divisor, and in both halves of an expert's rows."""
    num_rows = 240 * 4
    codes, starts, _ = drawn(1, 6000, num_codes=num_rows, share_of_starts=0.0)
    rows = row_ids(codes, starts, num_rows, max_order)[0]
    for order in range(max_order):
        read = rows[:, order].unique()
        owners = Counter((read % num_experts).tolist())
        assert len(owners) == num_experts
        mean = read.numel() / num_experts
        assert all(abs(count - mean) < 6 * mean**0.5 for count in owners.values()), owners
        halves = (read // num_experts < max_order * num_rows // num_experts // 2).float().mean()
        assert abs(float(halves) - 0.5) < 0.1
