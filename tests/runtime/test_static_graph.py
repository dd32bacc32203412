"""Captured functions give the gradients of the function itself, on CUDA's graphs and the recorder.

The recorder stands in for CUDA's graphs, which this machine may not have; where it has them, the
same tests run with both.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vqmoe_megatron.runtime.graphs import CudaGraph, Graph
from vqmoe_megatron.runtime.recorded_graph import RecordedGraph
from vqmoe_megatron.runtime.static_graph import Captured

KINDS = [
    pytest.param("cpu", RecordedGraph, id="recorder"),
    pytest.param(
        "cuda",
        CudaGraph,
        id="cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ),
]


class Layer(torch.nn.Module):
    """A floating output with gradient, an integer one without, an input that is handed through."""

    def __init__(self, device: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        self.weight = torch.nn.Parameter(weight.to(device))
        self.frozen = torch.nn.Parameter(torch.ones(4, device=device).double(), False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = x @ self.weight.t() * self.frozen[0]
        return logits.softmax(dim=1) @ self.weight, logits.argmax(dim=1), x


@pytest.mark.parametrize(("device", "new_graph"), KINDS)
def test_outputs_and_gradients_of_every_microbatch(
    device: str, new_graph: Callable[[], Graph]
) -> None:
    layer = Layer(device)
    captured = Captured(layer, [layer.weight, layer.weight, layer.frozen], [layer], new_graph)
    generator = torch.Generator().manual_seed(1)
    for number in range(4):
        x = torch.randn(5, 4, generator=generator, dtype=torch.float64).to(device)
        scale = 1.0 if number != 2 else 0.0  # a gradient of nothing
        results = []
        for function in (layer, captured):
            leaf = x.clone().requires_grad_()
            y, ids, same = function(leaf)
            (y.square().sum() * scale + (same * 3).sum()).backward()
            results.append((y.detach().clone(), ids.clone(), leaf.grad, layer.weight.grad.clone()))
            layer.weight.grad = None
        for wanted, found in zip(*results, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            layer.weight.mul_(1.1)  # in place, as optimizers do


@pytest.mark.parametrize(("device", "new_graph"), KINDS)
def test_an_output_without_gradient_gets_zeros(device: str, new_graph: Callable[[], Graph]) -> None:
    layer = Layer(device)
    captured = Captured(layer, [layer.weight], [layer], new_graph)
    x = torch.randn(5, 4, dtype=torch.float64, device=device, requires_grad=True)
    for _ in range(2):
        y, _, _ = captured(x)
        (of_x,) = torch.autograd.grad(y.sum(), x)
        (wanted,) = torch.autograd.grad(layer(x)[0].sum(), x)
        torch.testing.assert_close(of_x, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("device", "new_graph"), KINDS)
def test_a_second_forward_pass_before_the_backward_pass_is_refused(
    device: str, new_graph: Callable[[], Graph]
) -> None:
    layer = Layer(device)
    captured = Captured(layer, [layer.weight], [layer], new_graph)
    x = torch.randn(5, 4, dtype=torch.float64, device=device, requires_grad=True)
    captured(x)
    with pytest.raises(ValueError, match="before the backward pass of its last call"):
        captured(x)


@pytest.mark.parametrize(("device", "new_graph"), KINDS)
def test_gradients_that_are_kept_add_up_over_microbatches(
    device: str, new_graph: Callable[[], Graph]
) -> None:
    """Autograd would take a buffer of the graph for the ``grad``, and the next replay it back."""
    layer, plain = Layer(device), Layer(device)
    captured = Captured(layer, [layer.weight], [layer], new_graph)
    leaf = torch.rand(5, 4, dtype=torch.float64, device=device, requires_grad=True)
    other = leaf.detach().clone().requires_grad_()
    for _ in range(3):
        captured(leaf)[0].square().sum().backward()
        plain(other)[0].square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("device", "new_graph"), KINDS)
def test_what_accumulates_a_parameter_s_gradient_stays_out_of_the_capture(
    device: str, new_graph: Callable[[], Graph]
) -> None:
    """It belongs to the stream where it was made, which DDP's hooks keep alive."""
    layer = Layer(device)
    accumulator = layer.weight.expand_as(layer.weight).grad_fn.next_functions[0][0]
    runs = []
    accumulator.register_hook(lambda *_: runs.append(1))
    captured = Captured(layer, [layer.weight], [layer], new_graph)
    x = torch.rand(5, 4, dtype=torch.float64, device=device)
    weight = layer.weight
    captured(x)[0].sum().backward()
    assert len(runs) == 1 and layer.weight is weight
    captured(x)[0].sum().backward()
    assert len(runs) == 2


@pytest.mark.parametrize(("device", "new_graph"), KINDS)
def test_a_parameter_in_other_memory_is_captured_anew(
    device: str, new_graph: Callable[[], Graph]
) -> None:
    layer = Layer(device)
    captured = Captured(layer, [layer.weight], [layer], new_graph)
    x = torch.rand(5, 4, dtype=torch.float64, device=device)
    captured(x)[0].sum().backward()
    layer.weight.data = layer.weight.data * 2
    torch.testing.assert_close(captured(x)[0], layer(x)[0], rtol=1e-12, atol=1e-12)
