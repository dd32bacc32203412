"""What a model chunk remembers of the text before: the hidden states that entered its layers.

M tokens of memory, S of a segment, b sequences of a microbatch, H hidden size. A step has as many
microbatches as the last one, and row r of microbatch m goes on where the same row ended then: so
there is one memory for every microbatch and layer, ``[up to M, b, H]``, without gradient.
Evaluation has memories of its own, which are empty whenever a model is set to train or to evaluate.

Schedules give a chunk its microbatches in order, so a count of forward passes tells them apart.
Layers that are recomputed in a backward pass read what they read the first time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vqmoe_megatron.moe.memory.microbatches import Microbatches, is_in_backward

States = dict[int, torch.Tensor]  # by layer number, from 1 over the whole model


@dataclass(frozen=True)
class SegmentPass:
    """One forward pass of a chunk."""

    kept: States  # what the next segment of these rows will read; layers replace theirs
    earlier: States  # what this one reads


class SegmentMemory(torch.nn.Module):
    """The memory of one model chunk. It has no parameters; checkpoints hold it beside the model.

    Args:
        length_tokens: M.
        num_microbatches: of this rank in a step.
        batch_shape: (b, H).
        dtype: of hidden states.
        tp_group: whose ranks each hold a part of the sequence, with sequence parallelism; else
            None.
    """

    def __init__(
        self,
        length_tokens: int,
        num_microbatches: int,
        batch_shape: tuple[int, int],
        dtype: torch.dtype,
        tp_group: torch.distributed.ProcessGroup | None,
    ) -> None:
        super().__init__()
        self.length_tokens = length_tokens
        self.num_microbatches = num_microbatches
        self.batch_shape, self.dtype = batch_shape, dtype
        self.tp_group = tp_group
        self.layers: list[int] = []  # numbers of those that read it
        self.trained: list[States] = [{} for _ in range(num_microbatches)]
        self._evaluated: list[States] = []
        self._num_passes = {True: 0, False: 0}  # in training, in evaluation
        self._passes: Microbatches[SegmentPass] = Microbatches()

    def train(self, mode: bool = True) -> SegmentMemory:
        """Forget what was evaluated."""
        self._evaluated = [{} for _ in range(self.num_microbatches)]
        self._num_passes[False] = 0
        return super().train(mode)

    def begin(self) -> None:
        """A microbatch enters the chunk."""
        memories = self.trained if self.training else self._evaluated
        kept = memories[self._num_passes[self.training] % self.num_microbatches]
        self._num_passes[self.training] += 1
        self._passes.begin(SegmentPass(kept, dict(kept)))

    def follow(self, output: torch.Tensor) -> None:
        """``output`` is the chunk's; its backward pass begins there."""
        self._passes.follow(output)

    @torch.no_grad()
    def remember(self, layer: int, states: torch.Tensor) -> None:
        """Keep what enters a layer, ``[S, b, H]`` or this rank's part of S.

        Communicates with sequence parallelism: one all-gather over the tensor-parallel group.
        """
        if is_in_backward():  # recomputed: it was kept the first time
            return
        if self.tp_group is not None:
            parts = [torch.empty_like(states) for _ in range(self.tp_group.size())]
            torch.distributed.all_gather(parts, states.contiguous(), group=self.tp_group)
            states = torch.cat(parts)
        this = self._passes.current
        before = this.earlier.get(layer, states[:0])
        this.kept[layer] = torch.cat([before, states.detach()])[-self.length_tokens :].clone()

    def rows(self, layer: int, number: int) -> torch.Tensor:
        """``[b, up to M, H]`` that microbatch ``number`` of the next step will read in a layer."""
        states = self.trained[number].get(layer)
        if states is None:
            device = torch.cuda.current_device()
            states = torch.zeros((0, *self.batch_shape), dtype=self.dtype, device=device)
        return states.transpose(0, 1)

    @property
    def num_remembered_tokens(self) -> int:
        """Of every row: M, or as much as was trained on."""
        return max((len(s) for kept in self.trained for s in kept.values()), default=0)

    def earlier(self, layer: int) -> torch.Tensor | None:
        """``[up to M, b, H]`` that the current pass reads in a layer; None: nothing yet."""
        return self._passes.current.earlier.get(layer)
