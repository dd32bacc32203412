"""What the host decides for a codebook's step, without either side waiting for the other.

Random choices are drawn on the CPU from a seed that counts the steps: equal on all replicas and on
every kind of device, and checkpoints of older releases go on bit for bit. So the host must know the
count, and the device must get the draw; both go through pinned memory.
"""

from __future__ import annotations

import torch


def on_device(drawn: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a host tensor on ``device``. The copy takes its place in the device's queue, and the
    host goes on at once."""
    if device.type == "cpu":
        return drawn
    return drawn.pin_memory().to(device, non_blocking=True)


class StepsTaken:
    """The value of a counter on the device, known on the host one step later.

    ``follow`` sends a copy off behind the write, ``read`` takes it a step later, when it has long
    arrived. A counter that was replaced or written otherwise (the first step, a load) is read where
    it lies: a host synchronisation.
    """

    def __init__(self) -> None:
        self._counter: torch.Tensor | None = None
        self._version = 0  # of the counter when it was copied
        self._copied = torch.zeros((), dtype=torch.int64)  # on the host
        self._arrival: torch.cuda.Event | None = None

    def __reduce__(self) -> tuple:
        return StepsTaken, ()  # a copied or stored codebook has its counter; events cannot be

    def read(self, counter: torch.Tensor) -> int:
        """Value of an int64 scalar."""
        if counter is not self._counter or counter._version != self._version:
            return int(counter)
        if self._arrival is not None:
            self._arrival.synchronize()
        return int(self._copied)

    def follow(self, counter: torch.Tensor) -> None:
        """Copy the counter as it is now. No host synchronisation."""
        self._counter, self._version = counter, counter._version
        # Not blocking, torch copies to pinned memory.
        self._copied = counter.to("cpu", non_blocking=True, copy=True)
        if counter.is_cuda:
            self._arrival = torch.cuda.Event()
            self._arrival.record()
