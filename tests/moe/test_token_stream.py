"""Token ids of this rank's tokens, in the order of hidden states, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

IDS = torch.arange(24).view(2, 12)  # [b, S]


class Model(torch.nn.Module):
    """Called as Megatron's GPTModel is."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = torch.nn.Identity()

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.decoder(torch.ones(2, requires_grad=True) * 1)


def stream(tp_size: int = 1, tp_rank: int = 0):  # noqa: ANN201
    from vqmoe_megatron.moe.token_stream import TokenStream

    tp = SimpleNamespace(size=lambda: tp_size, rank=lambda: tp_rank)
    config = SimpleNamespace(sequence_parallel=tp_size > 1)
    return TokenStream(config, 24, SimpleNamespace(tp=tp))


@pytest.mark.parametrize("tp_rank", [0, 1, 2])
def test_a_rank_keeps_the_ids_of_its_shard(tp_rank: int) -> None:
    told = stream(3, tp_rank)
    told.begin(IDS)
    mine = [[int(IDS[b, s]) for b in range(2)] for s in range(4 * tp_rank, 4 * tp_rank + 4)]
    assert told.own_ids(torch.zeros(4, 2, 5)).tolist() == [one for row in mine for one in row]


def test_a_model_tells_its_stream_and_must_have_ids() -> None:
    from vqmoe_megatron.moe.token_stream import attach_token_stream

    model, told = Model(), stream()
    attach_token_stream(model, told)
    with pytest.raises(ValueError, match="was told no token ids"):
        told.own_ids(torch.zeros(12, 2, 5))
    model(IDS, IDS)
    first = told.own_ids(torch.zeros(12, 2, 5)).tolist()
    assert first == IDS.t().flatten().tolist()
    model(position_ids=IDS, input_ids=IDS + 1)
    assert told.own_ids(torch.zeros(12, 2, 5)).tolist() != first
    with pytest.raises(ValueError, match="needs input_ids on every pipeline stage"):
        model(None, IDS)
    with pytest.raises(ValueError, match=r"sees \[3, 2\] tokens and was told token ids \[12, 2\]"):
        told.own_ids(torch.zeros(3, 2, 5))


def test_a_backward_pass_sees_its_own_microbatch() -> None:
    from vqmoe_megatron.moe.token_stream import attach_token_stream

    model, told, seen = Model(), stream(), []
    attach_token_stream(model, told)
    outputs = []
    for step in range(2):  # as a pipeline does: two forward passes, then the backward ones
        x = torch.ones(2, requires_grad=True)
        x.register_hook(lambda _: seen.append(int(told.own_ids(torch.zeros(12, 2, 5))[0])))
        model.decoder.forward = lambda _, x=x: x * 1
        outputs.append(model(IDS + step, IDS))
    for output in outputs:
        output.sum().backward()
    assert seen == [0, 1]
