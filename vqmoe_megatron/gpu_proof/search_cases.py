"""Tokens and codes that are hard to search: what a rounded distance would get wrong.

``CASES`` maps a name to a function of (T, K, D, generator) that returns tokens [T, D] and codes
[K, D], fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Case = Callable[[int, int, int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]


def _gaussian(t: int, k: int, d: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(t, d, generator=g), torch.randn(k, d, generator=g)


def _clusters(t: int, k: int, d: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.randn(k, d, generator=g)
    near = codes[torch.randint(k, (t,), generator=g)]
    return near + 0.7 * torch.randn(t, d, generator=g), codes


def _common_part(t: int, k: int, d: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    x, codes = _clusters(t, k, d, g)
    common = 100 * torch.randn(1, d, generator=g)
    return x + common, codes + common


def _duplicates(t: int, k: int, d: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    x, codes = _clusters(t, k, d, g)
    return x, codes[torch.randint(max(1, k // 3), (k,), generator=g)]


def _one_ulp(t: int, k: int, d: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Every code again, one of its columns moved by one unit in the last place."""
    x, codes = _clusters(t, k, d, g)
    twins = codes[: k // 2].clone()
    rows, columns = torch.arange(k // 2), torch.randint(d, (k // 2,), generator=g)
    twins[rows, columns] = torch.nextafter(twins[rows, columns], torch.tensor(torch.inf))
    return x, torch.cat([codes[: k - k // 2], twins])


def _midway(t: int, k: int, d: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens half-way between two codes, moved towards one by a hair."""
    codes = torch.randn(k, d, generator=g)
    one, other = (codes[torch.randint(k, (t,), generator=g)] for _ in range(2))
    share = 0.5 + 1e-5 * torch.randn(t, 1, generator=g)
    return one * share + other * (1 - share), codes


def _outlier(t: int, k: int, d: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    x, codes = _gaussian(t, k, d, g)
    codes[0] *= 1e4
    return x, codes


def _uneven(t: int, k: int, d: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of very different size, as trained transformers have."""
    scale = torch.exp(3 * torch.randn(1, d, generator=g))
    x, codes = _gaussian(t, k, d, g)
    return x * scale, codes * scale


def _tiny(t: int, k: int, d: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    x, codes = _clusters(t, k, d, g)
    return x * 1e-21, codes * 1e-21


def _huge(t: int, k: int, d: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    x, codes = _clusters(t, k, d, g)
    return x * 1e15, codes * 1e15


CASES: dict[str, Case] = {
    "gaussian": _gaussian,
    "clusters": _clusters,
    "common part": _common_part,
    "duplicates": _duplicates,
    "one ulp": _one_ulp,
    "midway": _midway,
    "outlier": _outlier,
    "uneven columns": _uneven,
    "tiny": _tiny,
    "huge": _huge,
}


def exact_distances(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Half squared distances [T, K] up to a number of each token, fp64."""
    centre = codes.double().mean(dim=0)
    codes = codes.double() - centre
    return codes.square().sum(dim=1) * 0.5 - (x.double() - centre) @ codes.t()
