"""The combine kernels against plain torch, which test_combine.py holds against the formula."""

from __future__ import annotations

import pytest
import torch
from kernel_places import PLACES, run_kernel, skip_unless_possible

from vqmoe_megatron.vq.combine import gather_scale_add, gather_scale_add_backward

everywhere = pytest.mark.parametrize("place", PLACES)
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SCALE = 0.3
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7}  # the interpreter cuts to bf16, unrounded


def example(
    num_tokens: int = 37,
    num_codes: int = 2,
    hidden_size: int = 21,
    dtype: torch.dtype = torch.float32,
    table_dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(num_tokens, 2, generator=generator).softmax(dim=1)
    return {
        "table": torch.randn(11, hidden_size, generator=generator).to(table_dtype),
        "ids": torch.randint(11, (num_tokens, num_codes), generator=generator),
        "y_continuous": torch.randn(num_tokens, hidden_size, generator=generator).to(dtype),
        "p_continuous": p[:, 0],  # of stride 2, as a softmax leaves it
        "p_discrete": p[:, 1],
    }


def forward(place: str, parts: dict, dtype: torch.dtype) -> torch.Tensor:
    skip_unless_possible(place)
    from vqmoe_megatron.vq.combine_triton import gather_scale_add_triton

    arguments = [parts.get(name) for name in ("y_continuous", "p_continuous", "p_discrete")]
    out = run_kernel(
        place, gather_scale_add_triton, parts["table"], parts["ids"], SCALE, *arguments, dtype
    )
    assert out.dtype == dtype and out.is_contiguous()
    return out


def backward(place: str, grad: torch.Tensor, parts: dict) -> tuple[torch.Tensor | None, ...]:
    skip_unless_possible(place)
    from vqmoe_megatron.vq.combine_triton import gather_scale_add_backward_triton

    arguments = [parts.get(name) for name in ("y_continuous", "p_continuous", "p_discrete")]
    return run_kernel(
        place,
        gather_scale_add_backward_triton,
        grad,
        parts["table"],
        parts["ids"],
        SCALE,
        *arguments,
    )


def close(mine: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(mine, right, rtol=TOLERANCE[right.dtype], atol=2e-5)


def check(place: str, parts: dict, grad_dtype: torch.dtype = torch.float32) -> None:
    """Both kernels give what plain torch gives."""
    wanted = gather_scale_add(scale=SCALE, **parts)
    close(forward(place, parts, wanted.dtype), wanted)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(wanted.shape, generator=generator).to(grad_dtype)
    found = backward(place, grad, parts)
    for mine, right in zip(
        found, gather_scale_add_backward(grad, scale=SCALE, **parts), strict=True
    ):
        assert (mine is None) == (right is None)
        if right is not None:
            close(mine, right)


@everywhere
@pytest.mark.parametrize(
    ("num_tokens", "num_codes", "hidden_size"),
    [(37, 2, 21), (1, 1, 1), (300, 1, 8), (3, 3, 1100), (5, 4, 1024)],
)
def test_equals_plain_torch(place: str, num_tokens: int, num_codes: int, hidden_size: int) -> None:
    check(place, example(num_tokens, num_codes, hidden_size))


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_dtypes(place: str, dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    check(place, example(dtype=dtype, table_dtype=table_dtype), grad_dtype=dtype)


@everywhere
@pytest.mark.parametrize(
    "left_out",
    [
        ("p_continuous",),
        ("p_discrete",),
        ("p_continuous", "p_discrete"),
        ("y_continuous", "p_continuous"),
        ("y_continuous", "p_continuous", "p_discrete"),
    ],
)
def test_what_is_left_out(place: str, left_out: tuple[str, ...]) -> None:
    check(place, {name: part for name, part in example().items() if name not in left_out})


@everywhere
def test_no_tokens(place: str) -> None:
    check(place, example(num_tokens=0))


@everywhere
def test_strided_rows_and_columns(place: str) -> None:
    parts = example()
    parts["y_continuous"] = torch.randn(37, 50)[:, 5:26]
    parts["table"] = torch.randn(21, 11).t()
    parts["ids"] = torch.randint(11, (2, 37)).t()
    check(place, parts)
    parts["y_continuous"] = torch.randn(21, 37).t()
    check(place, parts)


@everywhere
def test_codes_outside_the_table_give_nan_for_their_token_alone(place: str) -> None:
    parts = example()
    wanted = gather_scale_add(scale=SCALE, **parts)
    right = gather_scale_add_backward(torch.ones_like(wanted), scale=SCALE, **parts)
    parts["ids"][4, 1], parts["ids"][30, 0] = 11, -1
    bad = torch.zeros(37, dtype=torch.bool)
    bad[[4, 30]] = True
    out = forward(place, parts, torch.float32)
    assert out[bad].isnan().all()
    torch.testing.assert_close(out[~bad], wanted[~bad])
    grad_y, grad_p_continuous, grad_p_discrete = backward(place, torch.ones_like(wanted), parts)
    assert grad_p_discrete[bad].isnan().all()
    torch.testing.assert_close(grad_p_discrete[~bad], right[2][~bad])
    torch.testing.assert_close(grad_y, right[0])
    torch.testing.assert_close(grad_p_continuous, right[1])


@on_cuda
def test_combine_uses_the_kernels_on_cuda() -> None:
    parts = example(num_tokens=4096, hidden_size=512)
    moved = {name: part.cuda() for name, part in parts.items()}
    grad = torch.randn(4096, 512)
    grad_cuda = grad.cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = gather_scale_add(scale=SCALE, **moved)
    found = gather_scale_add_backward(grad_cuda, scale=SCALE, **moved)
    extra = torch.cuda.max_memory_allocated() - before
    torch.testing.assert_close(out.cpu(), gather_scale_add(scale=SCALE, **parts))
    for mine, right in zip(
        found, gather_scale_add_backward(grad, scale=SCALE, **parts), strict=True
    ):
        torch.testing.assert_close(mine.cpu(), right, rtol=1e-4, atol=1e-4)
    assert extra < 2.2 * out.numel() * 4  # bytes: the result and the gradient of y
