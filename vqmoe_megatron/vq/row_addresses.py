"""Where a token's rows lie: hashes of its code and of the codes before it in its document.

b sequences, S tokens each, M rows per address, A addresses. Address ``o`` (1-based order) of token
t is a hash of ``k_t, ..., k_{t-o+1}`` in ``[0, M)``; what lies before the document counts as a code
of its own. The A rows of one address are neighbours, ``address * A + turn``, and which of them an
order reads turns with the address: so every order's rows are spread over all experts (row mod N),
and over what cuts rows in equal blocks, also where A and N have a common divisor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Odd 64-bit constants: of the golden ratio, and of the mixer of Steele et al.'s SplitMix64.
GOLDEN = -7046029254386353131
MIXERS = ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1))


def mix(x: torch.Tensor) -> torch.Tensor:
    """Hash int64 numbers to int64 numbers of 63 bits, as SplitMix64 does. No communication."""
    for shift, factor in MIXERS:
        kept = (1 << (64 - shift)) - 1  # an arithmetic shift of a negative number brings ones
        x = (x ^ ((x >> shift) & kept)) * factor
    return x & ((1 << 63) - 1)


def tokens_before(starts: torch.Tensor) -> torch.Tensor:
    """How many tokens of its document lie before each: int64 ``[b, S]`` of bool ``[b, S]`` starts.

    The first token of a sequence starts one whatever it says.
    """
    places = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    first = torch.where(starts, places, torch.zeros_like(places)).cummax(dim=1).values
    return places - first


def shifted(codes: torch.Tensor, before: torch.Tensor, distance: int) -> torch.Tensor:
    """Codes ``[b, S]`` of the token ``distance`` before, plus one; zero before the document."""
    moved = torch.nn.functional.pad(codes + 1, (distance, 0))[:, : codes.shape[1]]
    return torch.where(before >= distance, moved, torch.zeros_like(moved))


def hashed(parts: Sequence[torch.Tensor], num_rows: int, salt: int) -> torch.Tensor:
    """int64 tensors of one shape -> hashes of all of them together, in ``[0, num_rows)``."""
    x = torch.full_like(parts[0], salt)
    for part in parts:
        x = mix(x * GOLDEN + part)
    return x % num_rows


def row_ids(
    codes: torch.Tensor,
    starts: torch.Tensor,
    num_rows: int,
    max_order: int,
    context_codes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the rows of every token.

    Args:
        codes: int64 ``[b, S]``.
        starts: bool ``[b, S]``, first tokens of documents.
        num_rows: M. Single codes are their own address where they fit.
        max_order: of successive codes; A.
        context_codes: int64 ``[b, S]``, for two more addresses: alone, and with the token's code.

    Returns:
        int64 ``[b, S, A]`` in ``[0, A * M)``. No communication, no host synchronisation.
    """
    before = tokens_before(starts)
    addresses = [codes % num_rows]
    chain = [codes + 1]
    for order in range(2, max_order + 1):
        chain.append(shifted(codes, before, order - 1))
        addresses.append(hashed(chain, num_rows, order))
    if context_codes is not None:
        addresses.append(context_codes % num_rows)
        addresses.append(hashed([context_codes, codes], num_rows, 0))
    num_addresses = len(addresses)
    return torch.stack(
        [a * num_addresses + (mix(a) + i) % num_addresses for i, a in enumerate(addresses)],
        dim=-1,
    )
