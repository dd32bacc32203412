"""Which rank owns which expert, and through the ``mod`` code map which code.

Experts lie in contiguous blocks, as in Megatron: with N experts on P expert-parallel ranks, rank r
owns experts ``[r * N / P, (r + 1) * N / P)``. Ranks are expert-parallel ranks, 0 .. P-1.

    N = 8, P = 4      rank     0      1      2      3
                      experts  0 1    2 3    4 5    6 7
"""

from __future__ import annotations


def owner_rank(expert: int, num_experts: int, expert_model_parallel_size: int) -> int:
    """Return ``expert // (N / P)``, the expert-parallel rank that owns a global expert id.

    Raises ``ValueError`` for an expert outside ``[0, N)`` or N not divisible by P.
    """
    num_local_experts = _num_local_experts(num_experts, expert_model_parallel_size)
    if not 0 <= expert < num_experts:
        raise ValueError(f"0 <= expert < num_experts fails: expert {expert} of {num_experts}")
    return expert // num_local_experts


def experts_of_rank(rank: int, num_experts: int, expert_model_parallel_size: int) -> range:
    """Return ``[rank * N / P, (rank + 1) * N / P)``, the global ids of the experts a rank owns.

    Raises ``ValueError`` for a rank outside ``[0, P)`` or N not divisible by P.
    """
    num_local_experts = _num_local_experts(num_experts, expert_model_parallel_size)
    if not 0 <= rank < expert_model_parallel_size:
        raise ValueError(
            f"0 <= rank < expert_model_parallel_size fails: rank {rank} of "
            f"{expert_model_parallel_size}"
        )
    return range(rank * num_local_experts, (rank + 1) * num_local_experts)


def owner_of_code(code: int, num_experts: int, expert_model_parallel_size: int) -> int:
    """Return ``(code mod N) // (N / P)``, the rank that owns a code's expert under the mod map.

    Raises ``ValueError`` for a negative code or N not divisible by P.
    """
    if code < 0:
        raise ValueError(f"0 <= code fails: code {code}")
    _num_local_experts(num_experts, expert_model_parallel_size)
    return owner_rank(code % num_experts, num_experts, expert_model_parallel_size)


def _num_local_experts(num_experts: int, expert_model_parallel_size: int) -> int:
    if num_experts < 1 or expert_model_parallel_size < 1:
        raise ValueError(
            f"num_experts={num_experts} and expert_model_parallel_size="
            f"{expert_model_parallel_size} must be at least 1"
        )
    if num_experts % expert_model_parallel_size:
        raise ValueError(
            f"num_experts % expert_model_parallel_size != 0: {num_experts} % "
            f"{expert_model_parallel_size} = {num_experts % expert_model_parallel_size}"
        )
    return num_experts // expert_model_parallel_size
