"""A group of kernels and its time on the unit that it runs on.

    time = max(operations / roof of the unit, (bytes read + written) / roof of the memory)
           + launches * seconds of a launch

Units: ``bf16_tensor_core``, ``fp32_fma`` (fused multiply-adds outside the tensor cores, TF32 is not
assumed), ``bandwidth`` (no operations counted). Bytes are those of tensors, each read and written
as often as the program does: caches are not modelled, so a small table that many tokens read counts
once per token. Launches are counted from the program by hand, roughly. A host that falls
behind its device is not modelled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from vqmoe_megatron.plan.flops import Flops
from vqmoe_megatron.plan.hardware import BANDWIDTH, BF16_TENSOR_CORE, FP32_FMA, Hardware

FORWARD, BACKWARD, STEP = "forward", "backward", "step"  # of a microbatch; once per step
FP32_BYTES = 4
RECOMPUTE = "recompute"  # the part of forward passes that are repeated
PARTS = (  # rows of a predicted step
    *("attention", "dense MLP", "expert GEMMs", "shared expert", "code rows"),
    *("router and gate", "dispatch"),
    *("search", "combine", "fill", "straight-through", "codebook statistics", "code memory"),
    *("output layer", "element-wise", RECOMPUTE),
)


@dataclass(frozen=True)
class Kernel:
    """One group, of a microbatch or of a step."""

    part: str  # one of PARTS
    name: str
    phase: str  # forward | backward | step
    unit: str
    operations: int = 0  # a multiply-add counts as 2
    read_bytes: int = 0
    written_bytes: int = 0
    launches: int = 1

    def times(self, number: int) -> Kernel:
        """Repeated so often."""
        return replace(
            self,
            operations=self.operations * number,
            read_bytes=self.read_bytes * number,
            written_bytes=self.written_bytes * number,
            launches=self.launches * number,
        )

    def operation_seconds(self, hardware: Hardware) -> float:
        """At the unit's roof."""
        if self.unit == BANDWIDTH:
            return 0.0
        return self.operations / hardware.roof_flops_per_second(self.unit)

    def byte_seconds(self, hardware: Hardware) -> float:
        """At the memory's roof."""
        return (self.read_bytes + self.written_bytes) / hardware.memory_roof_bytes_per_second

    def seconds(self, hardware: Hardware) -> float:
        """The larger of both, and the launches."""
        busy = max(self.operation_seconds(hardware), self.byte_seconds(hardware))
        return busy + self.launches * hardware.launch_seconds


@dataclass(frozen=True)
class Row:
    """What one part of the model takes of a step on one rank."""

    part: str
    kernels: tuple[Kernel, ...]
    kernel_seconds: tuple[float, ...]  # of each
    seconds_by_bound: dict[str, float]  # of its kernels: the unit, ``bandwidth`` or ``launches``

    @property
    def seconds(self) -> float:
        """Of all kernels, one after the other."""
        return sum(self.kernel_seconds)


def rows_of(kernels: Iterable[Kernel], hardware: Hardware) -> tuple[Row, ...]:
    """Kernels by part, in the order of PARTS; parts without any are left out."""
    by_part: dict[str, list[Kernel]] = {part: [] for part in PARTS}
    for kernel in kernels:
        by_part[kernel.part].append(kernel)
    return tuple(_row(part, found, hardware) for part, found in by_part.items() if found)


def _row(part: str, kernels: list[Kernel], hardware: Hardware) -> Row:
    by_bound: dict[str, float] = {}
    for kernel in kernels:
        by_operations, by_bytes = (
            kernel.operation_seconds(hardware),
            kernel.byte_seconds(hardware),
        )
        bound = kernel.unit if by_operations >= by_bytes else BANDWIDTH
        by_bound[bound] = by_bound.get(bound, 0.0) + max(by_operations, by_bytes)
        launches = kernel.launches * hardware.launch_seconds
        by_bound["launches"] = by_bound.get("launches", 0.0) + launches
    seconds = tuple(kernel.seconds(hardware) for kernel in kernels)
    return Row(part, tuple(kernels), seconds, by_bound)


def model_unit(element_bytes: int) -> str:
    """Where products in the model's dtype run: 2 bytes are bf16."""
    return BF16_TENSOR_CORE if element_bytes == 2 else FP32_FMA


def moved(part: str, name: str, phase: str, read: int, written: int, launches: int = 1) -> Kernel:
    """Element-wise work, copies, gathers, sums and sorts: bytes alone."""
    return Kernel(part, name, phase, BANDWIDTH, 0, read, written, launches)


@dataclass(frozen=True)
class ProductBytes:
    """What a group of linear layers moves."""

    inputs: int  # bytes of all inputs
    outputs: int  # bytes of all outputs
    weights: int  # elements; 0 where another kernel of the same launch reads them
    element: int  # bytes of a weight


def products(
    part: str, name: str, unit: str, flops: Flops, tensors: ProductBytes, launches: int = 1
) -> Iterator[Kernel]:
    """A group of ``launches`` linear layers, forward and backward.

    The backward pass has two products for each of the forward pass, and adds weight gradients to
    Megatron's fp32 buffer by kernels of their own (``gradient_accumulation_fusion`` is off).
    """
    inputs, outputs, weights = tensors.inputs, tensors.outputs, tensors.weights
    weight_bytes = weights * tensors.element
    if flops.forward:
        read = inputs + weight_bytes
        yield Kernel(part, name, FORWARD, unit, flops.forward, read, outputs, launches)
    if flops.backward:
        read = outputs + weight_bytes + inputs + outputs
        written = inputs + weight_bytes
        yield Kernel(
            part, f"{name} gradients", BACKWARD, unit, flops.backward, read, written, 2 * launches
        )
        if weights:
            read, written = weight_bytes + weights * FP32_BYTES, weights * FP32_BYTES
            accumulation = f"{name} gradient accumulation"
            yield moved(part, accumulation, BACKWARD, read, written, launches)
