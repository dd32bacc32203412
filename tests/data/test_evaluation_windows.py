"""Windows score every token but the first exactly once, at every stride, size and layout."""

import math

import numpy as np
import pytest
import torch

from vqmoe_megatron.data.corpus import CorpusSplit
from vqmoe_megatron.data.evaluation_windows import EvaluationWindows, bits_per_byte, perplexity
from vqmoe_megatron.data.indexed_writer import IndexedWriter


def make_split(folder, num_tokens, num_bytes=None):
    """Tokens 0, 1, 2, ..., so that a label says which token it is."""
    with IndexedWriter(folder / "valid", "uint16") as writer:
        writer.write(np.arange(num_tokens))
        writer.end_document()
    return CorpusSplit(
        "valid",
        folder / "valid",
        "uint16",
        num_tokens,
        1,
        num_bytes or num_tokens,
        2 * num_tokens,
        0,
    )


def scored_tokens(windows):
    """(token, context length) of every scored prediction of one rank."""
    found = []
    for batch in windows:
        mask = batch["loss_mask"].bool()
        context = batch["position_ids"][mask] + 1
        found += list(zip(batch["labels"][mask].tolist(), context.tolist(), strict=True))
    return found


@pytest.mark.parametrize("num_tokens", [2, 5, 16, 17, 18, 100, 129])
@pytest.mark.parametrize("stride", [1, 5, 15, 16])
def test_each_token_is_scored_once_with_enough_context(tmp_path, num_tokens, stride):
    split = make_split(tmp_path, num_tokens)
    windows = EvaluationWindows(split, 16, stride, micro_batch_size=3)
    found = scored_tokens(windows)
    assert sorted(token for token, _ in found) == list(range(1, num_tokens))
    assert windows.num_scored_tokens == num_tokens - 1
    assert all(context >= min(token, 16 - stride + 1) for token, context in found)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_ranks_share_the_windows_evenly(tmp_path, dp_size):
    split = make_split(tmp_path, 1000)
    ranks = [
        EvaluationWindows(split, 16, 8, micro_batch_size=3, dp_rank=rank, dp_size=dp_size)
        for rank in range(dp_size)
    ]
    assert len({len(list(rank)) for rank in ranks}) == 1 and len(list(ranks[0])) == len(ranks[0])
    tokens = [token for rank in ranks for token, _ in scored_tokens(rank)]
    assert sorted(tokens) == list(range(1, 1000))
    assert ranks[0].num_windows == 1 + math.ceil((999 - 16) / 8)


def test_batches_have_the_training_form(tmp_path):
    batch = next(iter(EvaluationWindows(make_split(tmp_path, 100), 16, 4, micro_batch_size=2)))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
        "tokens": (torch.int64, (2, 16)),
        "labels": (torch.int64, (2, 16)),
        "loss_mask": (torch.float32, (2, 16)),
        "position_ids": (torch.int64, (2, 16)),
    }
    assert batch["tokens"].tolist() == [list(range(16)), list(range(4, 20))]
    assert batch["labels"].tolist() == [list(range(1, 17)), list(range(5, 21))]
    assert batch["loss_mask"].tolist() == [[1] * 16, [0] * 12 + [1] * 4]


@pytest.mark.parametrize(("window", "stride"), [(5, None), (5, 2), (16, 5), (1, 1)])
def test_shorter_windows_stand_alone_in_their_samples(tmp_path, window, stride):
    """Every token once, with at most ``window`` tokens of context; behind a window there is 0."""
    split = make_split(tmp_path, 100)
    windows = EvaluationWindows(split, 16, stride, 3, window_tokens=window)
    found = scored_tokens(windows)
    assert sorted(token for token, _ in found) == list(range(1, 100))
    assert max(context for _, context in found) == window
    least = window - (window if stride is None else stride) + 1
    assert all(context >= min(token, least) for token, context in found)
    for batch in windows:
        assert tuple(batch["tokens"].shape) == (3, 16)
        assert not batch["tokens"][:, window:].any() and not batch["loss_mask"][:, window:].any()
    assert windows.description.startswith(f"window {window}, stride {stride or window} tokens")


def test_a_rank_without_windows_gets_masked_ones(tmp_path):
    windows = EvaluationWindows(make_split(tmp_path, 10), 16, dp_rank=1, dp_size=2)
    (batch,) = windows
    assert batch["loss_mask"].sum() == 0 and batch["tokens"].sum() == 0


def test_a_subset_is_spread_evenly_and_independent_of_the_layout(tmp_path):
    split = make_split(tmp_path, 1601)  # 100 windows
    whole = EvaluationWindows(split, 16, max_windows=10)
    assert [token // 16 for token, context in scored_tokens(whole) if context == 1] == list(
        range(0, 100, 10)
    )
    assert whole.num_scored_tokens == 160
    assert whole.description == ("window 16, stride 16 tokens, 10 of 100 windows, evenly spread")
    shared = [
        token
        for rank in range(4)
        for token, _ in scored_tokens(
            EvaluationWindows(split, 16, None, 2, dp_rank=rank, dp_size=4, max_windows=10)
        )
    ]
    assert sorted(shared) == sorted(token for token, _ in scored_tokens(whole))
    assert EvaluationWindows(split, 16, max_windows=500).num_windows == 100


def test_scored_bytes_follow_the_split(tmp_path):
    windows = EvaluationWindows(make_split(tmp_path, 100, num_bytes=450), 16)
    assert windows.num_scored_bytes == pytest.approx(99 * 4.5)
    assert windows.description == "window 16, stride 16 tokens"


@pytest.mark.parametrize(
    ("num_tokens", "options", "message"),
    [
        (100, {"stride_tokens": 17}, "stride of 17"),
        (100, {"stride_tokens": 0}, "stride of 0"),
        (100, {"window_tokens": 17}, "window of 17 tokens must lie in 1..seq_length = 16"),
        (100, {"window_tokens": 0}, "window of 0"),
        (100, {"window_tokens": 8, "stride_tokens": 9}, r"stride of 9.* 1..window_tokens = 8"),
        (1, {}, "needs two"),
        (100, {"dp_rank": 2, "dp_size": 2}, "dp_rank"),
        (100, {"max_windows": 0}, "max_windows=0"),
    ],
)
def test_impossible_windows_are_refused(tmp_path, num_tokens, options, message):
    with pytest.raises(ValueError, match=message):
        EvaluationWindows(make_split(tmp_path, num_tokens), 16, **options)


def test_figures_of_a_uniform_guess():
    loss_sum = 50 * math.log(256)
    assert bits_per_byte(loss_sum, 50) == pytest.approx(8.0)
    assert bits_per_byte(loss_sum, 50, 200.0) == pytest.approx(2.0)
    assert perplexity(loss_sum, 50) == pytest.approx(256.0)
    assert perplexity(1e6, 1) == math.inf
    for function in (bits_per_byte, perplexity):
        with pytest.raises(ValueError, match="nothing was scored"):
            function(1.0, 0)
