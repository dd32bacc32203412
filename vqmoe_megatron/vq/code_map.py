"""The code map: which expert serves each code.

C code slices, K codes per slice, N experts. A row id is ``slice * K + code`` in ``[0, C * K)``.

``mod`` is the paper's rule, expert = row mod N, for any number of codes. ``balanced`` and
``clustered`` keep the same number of codes on every expert (so C * K must divide by N) and are
fixed once, when the codebook is initialised from data; the map is then part of the checkpoint,
because moving a code to another expert changes the model.
"""

from __future__ import annotations

import torch


def mod_map(num_rows: int, num_experts: int) -> torch.Tensor:
    """Expert = row mod N (arXiv 2411.19402, "flexible hash"). Returns int64 ``[num_rows]``."""
    return torch.arange(num_rows, dtype=torch.int64) % num_experts


def balanced_map(load: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Spread measured load evenly while giving every expert the same number of codes.

    Longest-processing-time rule: codes from the most to the least loaded, each to the least loaded
    expert that still has a free place.

    Args:
        load: ``[C * K]`` non-negative tokens per code, as measured.
        num_experts: N, a divisor of ``C * K``.

    Returns:
        int64 ``[C * K]``.

    Raises:
        ValueError: when ``C * K`` does not divide by N.
    """
    capacity = _codes_per_expert(load.numel(), num_experts)
    expert_load = [0.0] * num_experts
    free = [capacity] * num_experts
    experts = torch.empty(load.numel(), dtype=torch.int64)
    load = load.double().cpu()
    for row in torch.argsort(load, descending=True, stable=True).tolist():
        expert = min((e for e in range(num_experts) if free[e]), key=lambda e: (expert_load[e], e))
        experts[row] = expert
        expert_load[expert] += float(load[row])
        free[expert] -= 1
    return experts


def clustered_map(codes: torch.Tensor, num_experts: int, num_iterations: int = 10) -> torch.Tensor:
    """Keep similar codes on one expert while giving every expert the same number of codes.

    Balanced k-means: centres start at farthest-point codes; each round assigns codes to centres by
    ascending distance under equal capacity, then moves the centres.

    Args:
        codes: ``[C * K, W]`` the vector that stands for each row (product codes: its slice's).
        num_experts: N, a divisor of ``C * K``.
        num_iterations: rounds of assignment.

    Returns:
        int64 ``[C * K]``.

    Raises:
        ValueError: when ``C * K`` does not divide by N.
    """
    capacity = _codes_per_expert(codes.shape[0], num_experts)
    points = codes.detach().double().cpu()
    centres = _farthest_points(points, num_experts)
    experts = torch.empty(points.shape[0], dtype=torch.int64)
    for _ in range(num_iterations):
        assigned = _assign_under_capacity(torch.cdist(points, centres), capacity)
        if torch.equal(assigned, experts):
            break
        experts = assigned
        centres = torch.stack([points[experts == e].mean(dim=0) for e in range(num_experts)])
    return experts


def build_code_map(
    kind: str, codes: torch.Tensor, load: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """Build the map named by ``vq.code_map``.

    Args:
        kind: ``mod``, ``balanced`` or ``clustered``.
        codes: ``[C, K, D]`` the codebook.
        load: ``[C, K]`` tokens per code on the sample that initialised the codebook.
        num_experts: N.

    Returns:
        int64 ``[C * K]``, the expert of each row.

    Raises:
        ValueError: unknown kind, or unequal code counts for balanced and clustered.
    """
    if kind == "mod":
        return mod_map(codes.shape[0] * codes.shape[1], num_experts)
    if kind == "balanced":
        return balanced_map(load.reshape(-1), num_experts)
    if kind == "clustered":
        return clustered_map(codes.reshape(-1, codes.shape[-1]), num_experts)
    raise ValueError(f"code map {kind!r} is not one of mod, balanced, clustered")


class CodeMap(torch.nn.Module):
    """The map as a module: a persistent buffer, saved with the codes it belongs to."""

    expert_of_row: torch.Tensor  # int64 [C * K]

    def __init__(self, num_slices: int, num_codes: int, num_experts: int) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.num_experts = num_experts
        self.register_buffer("expert_of_row", mod_map(num_slices * num_codes, num_experts))

    def row_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Code ids int64 ``[T, C]`` -> row ids int64 ``[T, C]`` (``slice * K + code``)."""
        if ids.shape[1] == 1:
            return ids
        return ids + torch.arange(ids.shape[1], device=ids.device) * self.num_codes

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Code ids int64 ``[T, C]`` -> expert ids int64 ``[T, C]``. No communication."""
        return self.expert_of_row[self.row_ids(ids)]

    def assign(self, expert_of_row: torch.Tensor) -> None:
        """Replace the map with int64 ``[C * K]``."""
        self.expert_of_row.copy_(expert_of_row)


def _codes_per_expert(num_rows: int, num_experts: int) -> int:
    if num_rows % num_experts:
        raise ValueError(
            f"equal code counts per expert need num_codes % num_experts == 0: {num_rows} % "
            f"{num_experts} = {num_rows % num_experts}"
        )
    return num_rows // num_experts


def _farthest_points(points: torch.Tensor, count: int) -> torch.Tensor:
    chosen = [int(points.square().sum(dim=1).argmax())]
    distance = torch.cdist(points, points[chosen]).squeeze(1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, torch.cdist(points, points[chosen[-1:]]).squeeze(1))
    return points[chosen]


def _assign_under_capacity(distances: torch.Tensor, capacity: int) -> torch.Tensor:
    """distances [rows, N] -> int64 [rows]; closest pairs first, no expert above its capacity."""
    num_rows, num_experts = distances.shape
    experts = torch.full((num_rows,), -1, dtype=torch.int64)
    free = [capacity] * num_experts
    taken = [False] * num_rows
    for pair in torch.argsort(distances.reshape(-1), stable=True).tolist():
        row, expert = divmod(pair, num_experts)
        if not taken[row] and free[expert]:
            experts[row] = expert
            taken[row] = True
            free[expert] -= 1
    return experts
