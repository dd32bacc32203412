"""What is benchmarked: the sizes of one layer, and the grid of them that a command line names.

T tokens, H hidden size, F expert hidden size, N experts, K codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from vqmoe_megatron.plan.rules import expert_width_errors

ROUTINGS = ("balanced", "zipf", "one-hot")
PASSES = ("forward", "forward_backward")
NORMS = ("none", "separate", "shared")
DTYPES = ("float32", "bfloat16")
MIN_REPEATS = 3  # fewer have no deciles


class BenchFailed(Exception):
    """Nothing can be reported; the message is all that the command prints before exit code 1."""


class GateFailed(BenchFailed):
    """Arms disagree, so their times would compare different things; the message lists where."""


class RanksFailed(BenchFailed):
    """Local ranks did not finish; they printed their own errors."""


@dataclass(frozen=True)
class LayerCase:
    """One layer and its tokens.

    Raises:
        ValueError: for a size that is not positive, an unknown choice, widths that the experts'
            grouped GEMM does not take, or fewer codes than experts.
    """

    num_experts: int = 16  # N
    num_codes: int = 64  # K
    num_tokens: int = 4096  # T
    hidden_size: int = 256  # H
    ffn_hidden_size: int = 1024  # F
    routing: str = "balanced"
    norm: str = "none"  # of the discrete path, in all arms that have one
    dtype: str = "float32"
    seed: int = 1234

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_codes", "num_tokens", "hidden_size", "ffn_hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, legal in (("routing", ROUTINGS), ("norm", NORMS), ("dtype", DTYPES)):
            check_choice(name, getattr(self, name), legal)
        for error in self.width_errors():
            raise ValueError(error)
        if self.num_codes < self.num_experts:
            raise ValueError(
                f"num_codes={self.num_codes} < num_experts={self.num_experts}: the discrete arms "
                f"would leave {self.num_experts - self.num_codes} experts without any code"
            )

    def width_errors(self, etp: int = 1) -> Iterator[str]:
        """Yield what keeps the experts, cut over ``etp`` ranks, from the grouped GEMM."""
        element_bytes = 2 if self.dtype == "bfloat16" else 4
        return expert_width_errors(self.hidden_size, self.ffn_hidden_size, element_bytes, etp)

    @property
    def identity(self) -> dict[str, Any]:
        """The fields of a result row that say what was measured."""
        return {name: value for name, value in asdict(self).items() if name != "seed"}

    @property
    def words(self) -> str:
        """The sizes and the routing, for messages."""
        return f"N={self.num_experts} K={self.num_codes} T={self.num_tokens} {self.routing}"

    def row(self, arm: str, text: str, pass_name: str) -> dict[str, Any]:
        """Begin the result row of an arm on one rank."""
        named = {"arm": arm, "text": text, **self.identity}
        return {**named, "expert_model_parallel_size": 1, "pass": pass_name}


def layer_cases(
    num_experts: Sequence[int],
    num_codes: Sequence[int | None],
    routings: Sequence[str],
    **common: Any,
) -> tuple[list[LayerCase], list[str]]:
    """Return every combination once, and what was left out with its reason.

    Args:
        num_experts: values of N.
        num_codes: values of K; None stands for K = N.
        routings: names.
        common: the other fields of :class:`LayerCase`.

    Raises:
        ValueError: when no legal combination is left, or for an illegal value.
    """
    cases: list[LayerCase] = []
    left_out: list[str] = []
    for routing, experts, codes in product(routings, num_experts, num_codes):
        if codes is not None and 1 <= codes < experts:
            left_out.append(f"num_codes={codes} < num_experts={experts}")
            continue
        case = LayerCase(experts, experts if codes is None else codes, routing=routing, **common)
        if case not in cases:
            cases.append(case)
    if not cases:
        raise ValueError(f"nothing is left to measure: {', '.join(left_out)}")
    return cases, list(dict.fromkeys(left_out))


def parse_numbers(text: str, option: str) -> list[int]:
    """Return the positive integers of a comma-separated list.

    Raises:
        ValueError: naming the option.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{option} {text!r}: give comma-separated integers, such as 16,64"
        ) from None
    for number in numbers:
        if number < 1:
            raise ValueError(f"{option} {text!r}: {number} must be at least 1")
    return numbers


def parse_codes(text: str) -> list[int | None]:
    """Return the values of --num-codes; ``N`` becomes None, as many codes as experts."""
    parts = text.split(",")
    numbers = ",".join(part for part in parts if part != "N")
    found = iter(parse_numbers(numbers, "--num-codes") if numbers else [])
    return [None if part == "N" else next(found) for part in parts]


def parse_choices(text: str, option: str, legal: Sequence[str]) -> list[str]:
    """Return the names of a comma-separated list.

    Raises:
        ValueError: listing the legal names.
    """
    names = text.split(",")
    for name in names:
        check_choice(option, name, legal)
    return names


def check_choice(name: str, value: str, legal: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``legal``."""
    if value not in legal:
        raise ValueError(f"{name} {value!r}: choose from {', '.join(legal)}")


def check_repeats(num_repeats: int, num_warmup: int) -> None:
    """Raise ``ValueError`` for fewer repeats than a decile needs, or a negative warm-up."""
    if num_repeats < MIN_REPEATS:
        raise ValueError(f"--repeats {num_repeats}: at least {MIN_REPEATS} are needed for deciles")
    if num_warmup < 0:
        raise ValueError(f"--warmup {num_warmup} must be at least 0")
