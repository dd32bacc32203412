"""gather_scale_add and its gradients in plain torch, against the formula and autograd in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vqmoe_megatron.vq import combine
from vqmoe_megatron.vq.combine import gather_scale_add, gather_scale_add_backward

SCALE = 3**-0.5
LEFT_OUT = [(), ("p_continuous",), ("p_discrete",), ("p_continuous", "p_discrete")]
LEFT_OUT += [("y_continuous", "p_continuous"), ("y_continuous", "p_continuous", "p_discrete")]


def example(
    num_tokens: int = 45, num_codes: int = 3, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    p = random(num_tokens, 2).softmax(dim=1)
    return {
        "table": random(11, 21),
        "ids": torch.randint(11, (num_tokens, num_codes), generator=generator),
        "y_continuous": random(num_tokens, 21),
        "p_continuous": p[:, 0],  # of stride 2, as a softmax leaves it
        "p_discrete": p[:, 1],
    }


def formula(parts: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    """The definition, differentiable."""
    total = scale * parts["table"][parts["ids"]].sum(dim=1)
    if "p_discrete" in parts:
        total = parts["p_discrete"][:, None] * total
    if "y_continuous" not in parts:
        return total
    y = parts["y_continuous"]
    return total + (parts["p_continuous"][:, None] * y if "p_continuous" in parts else y)


def gradients_by_autograd(
    grad: torch.Tensor, parts: dict[str, torch.Tensor], scale: float
) -> list[torch.Tensor | None]:
    names = ["y_continuous", "p_continuous", "p_discrete"]
    leaves = {name: parts[name].clone().requires_grad_() for name in names if name in parts}
    if not leaves:
        return [None, None, None]
    out = formula({**parts, **leaves}, scale)
    found = torch.autograd.grad(out, list(leaves.values()), grad)
    by_name = dict(zip(leaves, found, strict=True))
    return [by_name.get(name) for name in names]


@pytest.fixture(params=[1, 64, 1 << 16])
def any_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combine, "BLOCK_ELEMENTS", request.param)


@pytest.mark.usefixtures("any_blocks")
@pytest.mark.parametrize("left_out", LEFT_OUT)
@pytest.mark.parametrize(("num_tokens", "num_codes"), [(45, 3), (45, 1), (1, 2), (0, 3)])
def test_equals_the_formula_and_autograd(
    left_out: tuple[str, ...], num_tokens: int, num_codes: int
) -> None:
    parts = example(num_tokens, num_codes)
    parts = {name: part for name, part in parts.items() if name not in left_out}
    out = gather_scale_add(scale=SCALE, **parts)
    torch.testing.assert_close(out, formula(parts, SCALE), rtol=1e-14, atol=1e-14)
    grad = torch.randn_like(out)
    found = gather_scale_add_backward(grad, scale=SCALE, **parts)
    for mine, wanted in zip(found, gradients_by_autograd(grad, parts, SCALE), strict=True):
        assert (mine is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(mine, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_bf16_is_rounded_once(table_dtype: torch.dtype) -> None:
    parts = example(dtype=torch.float32)
    parts["y_continuous"] = parts["y_continuous"].bfloat16()
    parts["table"] = parts["table"].to(table_dtype)
    exact = {
        name: part.double() if part.is_floating_point() else part for name, part in parts.items()
    }
    out = gather_scale_add(scale=SCALE, **parts)
    assert torch.equal(out, formula(exact, SCALE).bfloat16())
    grad = torch.randn(45, 21).bfloat16()
    found = gather_scale_add_backward(grad, scale=SCALE, **parts)
    wanted = gradients_by_autograd(grad.double(), exact, SCALE)
    assert [part.dtype for part in found] == [torch.bfloat16, torch.float32, torch.float32]
    assert torch.equal(found[0], wanted[0].bfloat16())
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2].double(), wanted[2], rtol=1e-5, atol=1e-5)


def test_the_result_has_the_dtype_asked_for_or_that_of_its_first_term() -> None:
    parts = example(dtype=torch.float32)
    table, ids = parts["table"], parts["ids"]
    assert gather_scale_add(table.bfloat16(), ids).dtype == torch.bfloat16
    assert gather_scale_add(table, ids, dtype=torch.bfloat16).dtype == torch.bfloat16
    y = parts["y_continuous"].bfloat16()
    assert gather_scale_add(table, ids, y_continuous=y).dtype == torch.bfloat16


def test_no_gradient_and_no_argument_is_changed() -> None:
    parts = example()
    leaves = {
        name: part.clone().requires_grad_() if part.is_floating_point() else part
        for name, part in parts.items()
    }
    out = gather_scale_add(scale=SCALE, **leaves)
    assert not out.requires_grad
    gather_scale_add_backward(torch.ones_like(out), scale=SCALE, **leaves)
    assert all(torch.equal(leaves[name], part) for name, part in parts.items())


class LargestTensors(TorchDispatchMode):
    """Remembers the largest numbers of elements of new tensors that operations made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result._base is None:
            self.sizes.append(result.numel())
        return result


def test_nothing_but_results_is_as_large_as_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combine, "BLOCK_ELEMENTS", 200)
    parts = example(num_tokens=300, dtype=torch.float32)
    grad = torch.randn(300, 21)

    def num_large(run: Callable[[], object]) -> int:
        with LargestTensors() as made:
            run()
        return sum(size >= grad.numel() // 2 for size in made.sizes)

    assert num_large(lambda: gather_scale_add(**parts)) == 1
    assert num_large(lambda: gather_scale_add_backward(grad, **parts)) == 1  # that of y
    del parts["y_continuous"], parts["p_continuous"]
    assert num_large(lambda: gather_scale_add_backward(grad, **parts)) == 0


def test_a_code_outside_the_table_is_an_error() -> None:
    parts = example()
    parts["ids"][7, 1] = 11
    with pytest.raises(RuntimeError, match="(?i)expected i"):
        gather_scale_add(**parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.zeros(3)}, r"need table \[R, H\] and int64 ids \[T, C\]"),
        ({"ids": torch.zeros(45, 0, dtype=torch.int64)}, "C >= 1"),
        ({"ids": torch.zeros(45, 2, dtype=torch.int32)}, "got table .* and torch.int32 ids"),
        ({"y_continuous": torch.zeros(45, 20)}, r"y_continuous is \[45, 20\]; .* need \[45, 21\]"),
        ({"p_continuous": torch.zeros(45, 1)}, r"p_continuous is \[45, 1\]; .* need \[45\]"),
        ({"p_discrete": torch.zeros(44)}, r"p_discrete is \[44\]; .* need \[45\]"),
        ({"y_continuous": None}, "p_continuous weighs y_continuous, which is None"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, message: str) -> None:
    parts = {**example(), **change}
    with pytest.raises(ValueError, match=message):
        gather_scale_add(**parts)
    with pytest.raises(ValueError, match=message):
        gather_scale_add_backward(torch.zeros(45, 21), **parts)


def test_a_gradient_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"grad is \[45, 20\]; the result was \[45, 21\]"):
        gather_scale_add_backward(torch.zeros(45, 20), **example())
