"""The code memory, slow and readable: what every fast form must equal.

b sequences of S tokens, A addresses per token, M rows per address, V vocabulary entries, K codes, H
width.

Python integers and loops over tokens, entries and codes; no ranks, no hashing of tensors.

1. Row of order o: a hash of the codes of a token and of the o - 1 before it in its document.
2. Context of a token: decayed sum of the embeddings up to it in its document.
3. Codes of the vocabulary: one round of weighted k-means.
4. Output: what a token reads is the sum over its rows, V[row].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

MASK = 2**64 - 1
GOLDEN_RATIO = 0x9E3779B97F4A7C15


def split_mix(x: int) -> int:
    """SplitMix64's finalizer on a number of 64 bits, of which the highest bit is then dropped."""
    x &= MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return (x ^ (x >> 31)) & (2**63 - 1)


def hashed(parts: Sequence[int], num_rows: int, salt: int) -> int:
    """One number in ``[0, num_rows)`` of several."""
    x = salt
    for part in parts:
        x = split_mix(x * GOLDEN_RATIO + part)
    return x % num_rows


def oracle_rows(
    codes: Sequence[int],
    starts: Sequence[bool],
    num_rows: int,
    max_order: int,
    context_codes: Sequence[int] | None = None,
) -> list[list[int]]:
    """Rows ``[S][A]`` of one sequence, token by token.

    Args:
        codes: of its S tokens.
        starts: whether a document starts at each; the first token starts one in any case.
        num_rows: M.
        max_order: addresses of 1 to so many codes.
        context_codes: of its tokens, for two more addresses.
    """
    rows, first = [], 0
    for t, code in enumerate(codes):
        first = t if starts[t] else first
        addresses = [code % num_rows]
        for order in range(2, max_order + 1):
            places = range(t, t - order, -1)
            run = [codes[place] + 1 if place >= first else 0 for place in places]
            addresses.append(hashed(run, num_rows, order))
        if context_codes is not None:
            addresses.append(context_codes[t] % num_rows)
            addresses.append(hashed([context_codes[t], code], num_rows, 0))
        rows.append([_row(a, i, len(addresses)) for i, a in enumerate(addresses)])
    return rows


def _row(address: int, index: int, num_addresses: int) -> int:
    return address * num_addresses + (split_mix(address) + index) % num_addresses


def oracle_context_means(
    vectors: torch.Tensor, starts: Sequence[bool], decay: float
) -> torch.Tensor:
    """``[S, D]`` of one sequence -> its decayed means ``[S, D]``, every term of every token."""
    means, first = [], 0
    for t in range(vectors.shape[0]):
        first = t if starts[t] else first
        mean = torch.zeros_like(vectors[0])
        for place in range(first, t + 1):
            mean = mean + (1.0 - decay) * decay ** (t - place) * vectors[place]
        means.append(mean)
    return torch.stack(means)


def oracle_round(
    embeddings: torch.Tensor,
    weights: Sequence[float],
    ids: Sequence[int],
    codes: torch.Tensor,
    is_first: bool,
) -> tuple[torch.Tensor, list[int]]:
    """One round of k-means; return the codes ``[K, H]`` and every entry's code.

    Args:
        embeddings: ``[V, H]``.
        weights: how often each entry is seen.
        ids: the entries' codes before.
        codes: ``[K, H]`` before.
        is_first: the most frequent entries become the codes, the others stay.
    """
    codes = codes.clone()
    if is_first:
        idle = list(range(codes.shape[0]))
        errors = list(weights)
    else:
        seen = [v for v, weight in enumerate(weights) if weight > 0]
        idle = [k for k in range(codes.shape[0]) if all(ids[v] != k for v in seen)]
        for k in set(range(codes.shape[0])) - set(idle):
            members = [v for v in seen if ids[v] == k]
            total = sum(weights[v] for v in members)
            codes[k] = sum(weights[v] * embeddings[v] for v in members) / total
        errors = []
        for v, (weight, k) in enumerate(zip(weights, ids, strict=True)):
            distance = float((embeddings[v] - codes[k]).square().sum())
            is_there = distance <= 1e-9 * float(embeddings[v].square().sum())
            errors.append(0.0 if is_there else weight * distance)
    worst = sorted(range(len(errors)), key=lambda v: -errors[v])  # stable: ties to the lower entry
    for k, v in zip(idle, worst, strict=False):
        if errors[v] > 0:
            codes[k] = embeddings[v]
    distances = [[float((e - code).square().sum()) for code in codes] for e in embeddings]
    return codes, [row.index(min(row)) for row in distances]


def oracle_memory(
    x: torch.Tensor,
    rows: Sequence[Sequence[int]],
    values: torch.Tensor,
    expert: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
    gate: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """What T tokens ``x [T, H]`` read by ``rows [T][A]``: ``[T, H]``.

    Args:
        x: hidden states, for the gate.
        rows: of each token.
        values: ``[N, R / N, H]``, row ``j N + e`` is row j of expert e.
        expert: of (number, input ``[H]``), where values are inputs of their owner.
        gate: weight ``[1, H]`` and bias ``[1]`` of a sigmoid that weighs a token's reading.
    """
    num_experts, outputs = values.shape[0], []
    for token, read in zip(x, rows, strict=True):
        total = torch.zeros_like(token)
        for row in read:
            value = values[row % num_experts, row // num_experts]
            total = total + (value if expert is None else expert(row % num_experts, value))
        if gate is not None:
            total = total * torch.sigmoid(gate[0][0] @ token + gate[1][0])
        outputs.append(total)
    return torch.stack(outputs)
