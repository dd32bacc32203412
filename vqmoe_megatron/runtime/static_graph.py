"""A differentiable function that is captured once and replayed (graphs.py).

A CUDA graph repeats the kernels of one call on the same addresses. So the captured function has
buffers of its own for inputs, outputs and gradients; a call copies its inputs in and replays, and
the backward pass replays a second graph. Python inside the function runs before the capture, to
choose and load kernels, at the capture, and never again: it must not count, branch on values, or
wait for the device.

Gradients are taken to aliases of the parameters that belong to the graph. What accumulates a real
parameter's gradient lives on the stream where it was made, the default one where Megatron's DDP
holds it or an earlier microbatch is still referred to, and would draw that stream into the capture,
which CUDA refuses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch

from vqmoe_megatron.runtime.graphs import CudaGraph, Graph

Tensors = tuple[torch.Tensor, ...]


class Captured:
    """A function of tensors, captured with its gradient at the first call for its inputs' shapes.

    Args:
        function: from tensors to a tuple of tensors; its floating outputs may need a gradient.
        parameters: what else it differentiates to. Their gradients come out of autograd as those
            of inputs do, so that hooks on them (Megatron's DDP) see every microbatch.
        modules: hold the parameters where the function reads them.
        new_graph: builds the graph.

    Between a forward pass and its backward pass there may be no second forward pass: its
    activations would be overwritten. Parameters that moved to other memory are captured anew.
    """

    def __init__(
        self,
        function: Callable[..., Tensors],
        parameters: Iterable[torch.nn.Parameter],
        modules: Iterable[torch.nn.Module],
        new_graph: Callable[[], Graph] = CudaGraph,
    ) -> None:
        self.function = function
        self.parameters = [p for p in dict.fromkeys(parameters) if p.requires_grad]
        self.modules = list(modules)
        self.new_graph = new_graph
        self._passes: dict[tuple, _Passes] = {}
        self._addresses: list[int] = []

    def __call__(self, *inputs: torch.Tensor) -> Tensors:
        """As ``function``, with gradients; outputs are buffers that the next call overwrites.

        Raises:
            ValueError: for a second forward pass before the first one's backward pass.
        """
        addresses = [p.data_ptr() for p in self.parameters]
        if addresses != self._addresses:
            self._passes.clear()
            self._addresses = addresses
        key = tuple((x.shape, x.dtype, x.requires_grad) for x in inputs)
        if key not in self._passes:
            self._passes[key] = _Passes(self, inputs)
        return _Replay.apply(self._passes[key], *inputs, *self.parameters)


@contextlib.contextmanager
def _replaced(
    modules: list[torch.nn.Module], aliases: dict[torch.nn.Parameter, torch.nn.Parameter]
) -> Iterator[None]:
    """Let the modules hold the aliases in the place of their parameters."""
    places = {
        (owner, name): parameter
        for module in modules
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter in aliases
    }
    try:
        for (owner, name), parameter in places.items():
            owner._parameters[name] = aliases[parameter]
        yield
    finally:
        for (owner, name), parameter in places.items():
            owner._parameters[name] = parameter


def _alias(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """The same memory, with the marks that Megatron put on the parameter."""
    alias = torch.nn.Parameter(parameter.detach())
    alias.__dict__.update(parameter.__dict__)
    return alias


class _Passes:
    """The static buffers and both graphs for inputs of some shapes."""

    def __init__(self, owner: Captured, inputs: Tensors) -> None:
        self.function, self.modules = owner.function, owner.modules
        self.inputs = tuple(
            torch.empty_like(x, memory_format=torch.contiguous_format).requires_grad_(
                x.requires_grad
            )
            for x in inputs
        )
        self.aliases = {parameter: _alias(parameter) for parameter in owner.parameters}
        self.leaves = [*(x for x in self.inputs if x.requires_grad), *self.aliases.values()]
        self.waits_for_backward = False
        self.outputs: Tensors = ()
        self.differentiable: list[int] = []  # of outputs, those that a gradient may come to
        self.output_grads: list[torch.Tensor] = []
        self.leaf_grads: tuple[torch.Tensor | None, ...] = ()
        self._copy_in(inputs)
        graph = owner.new_graph()
        graph.warm_up(self._both)
        self.replay_forward = graph.capture(self._forward)
        self.replay_backward = graph.capture(self._backward)

    @torch.no_grad()
    def _copy_in(self, inputs: Tensors) -> None:
        for static, x in zip(self.inputs, inputs, strict=True):
            static.copy_(x)

    def _both(self) -> None:
        self._forward()
        self.differentiable = [i for i, y in enumerate(self.outputs) if y.requires_grad]
        self.output_grads = [torch.zeros_like(self.outputs[i]) for i in self.differentiable]
        self._backward()
        self.outputs = self.leaf_grads = ()  # of no use, and not to be freed in the capture

    def _forward(self) -> None:
        with torch.enable_grad(), _replaced(self.modules, self.aliases):
            self.outputs = self.function(*self.inputs)

    def _backward(self) -> None:
        outputs = [self.outputs[i] for i in self.differentiable]
        self.leaf_grads = torch.autograd.grad(
            outputs, self.leaves, self.output_grads, allow_unused=True
        )

    def run_forward(self, inputs: Tensors) -> Tensors:
        """Outputs of a replay, in buffers that the next one overwrites."""
        if self.waits_for_backward:
            raise ValueError(
                "a captured function is called again before the backward pass of its last call, "
                "whose activations would be overwritten; train.cuda_graphs is for schedules that "
                "alternate forward and backward passes (pipeline_model_parallel_size=1)"
            )
        self._copy_in(inputs)
        self.replay_forward()
        self.waits_for_backward = True
        return tuple(y.detach() for y in self.outputs)

    def run_backward(self, grads: list[torch.Tensor | None]) -> Tensors:
        """Gradients of all leaves, in buffers that the next replay overwrites.

        They are referred to from here, so that autograd copies what it keeps as a parameter's
        ``grad``.
        """
        for static, grad in zip(self.output_grads, grads, strict=True):
            if grad is None:
                static.zero_()
            else:
                static.copy_(grad)
        self.replay_backward()
        self.waits_for_backward = False
        return self.leaf_grads


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, passes: _Passes, *inputs: torch.Tensor):  # noqa: ANN001, ANN205
        ctx.passes = passes
        ctx.takes_gradient = [x.requires_grad for x in passes.inputs]
        outputs = passes.run_forward(inputs[: len(passes.inputs)])
        others = [y for i, y in enumerate(outputs) if i not in passes.differentiable]
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, *grads: torch.Tensor | None):  # noqa: ANN001, ANN205
        passes = ctx.passes
        of_leaves = iter(passes.run_backward([grads[i] for i in passes.differentiable]))
        of_inputs = [_copied(next(of_leaves)) if takes else None for takes in ctx.takes_gradient]
        return None, *of_inputs, *of_leaves


def _copied(grad: torch.Tensor | None) -> torch.Tensor | None:
    """What goes on through other operations, views among them, may be kept where they end."""
    return None if grad is None else grad.clone()
