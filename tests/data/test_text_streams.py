"""Streams: which token lies in which row of which step, at every layout and after every resume."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from vqmoe_megatron.data.corpus import CorpusSplit
from vqmoe_megatron.data.indexed_writer import IndexedWriter
from vqmoe_megatron.data.text_streams import EvaluationStreams, StreamRows, training_streams


def make_split(folder, num_tokens, num_bytes=None):
    """Tokens 0, 1, 2, ..., so that a label says which token it is."""
    folder.mkdir(exist_ok=True)
    with IndexedWriter(folder / "valid", "uint16") as writer:
        writer.write(np.arange(num_tokens))
        writer.end_document()
    num_bytes = num_bytes or num_tokens
    prefix = folder / "valid"
    return CorpusSplit("valid", prefix, "uint16", num_tokens, 1, num_bytes, 2 * num_tokens, 0)


def batches_of(split, consumed, count, rows=3, length=2, micro=1, rank=0, size=1):
    reader = StreamRows(split, length, rows, micro, rank, size)
    return list(islice(training_streams(reader, consumed), count))


def test_the_drawn_streams(tmp_path):
    split = make_split(tmp_path, 13)  # 12 predictions
    found = [batch["tokens"].tolist()[0] for batch in batches_of(split, 0, 9)]
    assert found == [[0, 1], [4, 5], [8, 9], [2, 3], [6, 7], [10, 11], [4, 5], [8, 9], [0, 1]]
    last = batches_of(split, 3, 3)[2]
    assert last["labels"].tolist() == [[11, 12]]  # the token that predicts nothing
    assert {name: (value.dtype, tuple(value.shape)) for name, value in last.items()} == {
        "tokens": (torch.int64, (1, 2)),
        "labels": (torch.int64, (1, 2)),
        "loss_mask": (torch.float32, (1, 2)),
        "position_ids": (torch.int64, (1, 2)),
    }
    assert last["loss_mask"].tolist() == [[1, 1]] and last["position_ids"].tolist() == [[0, 1]]


@pytest.mark.parametrize("num_tokens", [101, 110])
def test_every_row_goes_on_where_it_ended(tmp_path, num_tokens):
    batches = batches_of(make_split(tmp_path, num_tokens), 0, 60, rows=4, length=7, micro=4)
    for before, after in zip(batches, batches[1:], strict=False):
        wanted = before["labels"][:, -1] % (num_tokens - 1)
        assert torch.equal(after["tokens"][:, 0], wanted)
    seen = torch.cat([batch["tokens"].flatten() for batch in batches]).unique()
    assert seen.tolist() == list(range(num_tokens - 1))


@pytest.mark.parametrize(("size", "micro"), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_a_row_is_the_same_stream_at_every_layout(tmp_path, size, micro):
    split = make_split(tmp_path, 500)
    whole = [batch["tokens"] for batch in batches_of(split, 0, 5, 8, 6, 8)]
    per_step = 8 // (size * micro)
    for rank in range(size):
        found = batches_of(split, 16, 3 * per_step, 8, 6, micro, rank, size)
        for number, batch in enumerate(found):
            step, microbatch = divmod(number, per_step)
            first = (microbatch * size + rank) * micro
            assert torch.equal(batch["tokens"], whole[2 + step][first : first + micro])


def scored(streams):
    """(row's token, place in its segment) of every scored prediction."""
    found = []
    for batch in streams:
        mask = batch["loss_mask"].bool()
        labels, places = batch["labels"][mask], batch["position_ids"][mask]
        found += list(zip(labels.tolist(), places.tolist(), strict=True))
    return found


@pytest.mark.parametrize("num_tokens", [2, 5, 64, 65, 100])
@pytest.mark.parametrize("size", [1, 2])
def test_evaluation_scores_every_prediction_once(tmp_path, num_tokens, size):
    split = make_split(tmp_path, num_tokens, num_bytes=3 * num_tokens)
    ranks = [StreamRows(split, 8, 4, 2, rank, size) for rank in range(size)]
    streams = [EvaluationStreams(split, rows, 16, 100) for rows in ranks]
    found = [token for one in streams for token, _ in scored(one)]
    assert sorted(found) == list(range(1, num_tokens))
    assert streams[0].num_scored_tokens == num_tokens - 1
    assert streams[0].num_scored_bytes == pytest.approx(3 * (num_tokens - 1))
    assert all(len(list(one)) == len(one) for one in streams)


def test_evaluation_of_some_segments_of_each_row(tmp_path):
    split = make_split(tmp_path, 401)
    streams = EvaluationStreams(split, StreamRows(split, 8, 4, 4, 0, 1), 16, 3)
    assert sorted(token for token, _ in scored(streams)) == [
        100 * row + place for row in range(4) for place in range(1, 25)
    ]
    assert streams.num_scored_tokens == 96
    assert streams.description == (
        "4 rows in order, segments of 8 tokens with up to 16 of memory, every token scored once, "
        "the first 3 of 13 segments of a row"
    )


def test_what_is_no_stream_is_refused(tmp_path):
    split = make_split(tmp_path, 100)
    for rows, micro, rank, size in ((6, 4, 0, 1), (4, 2, 2, 2), (4, 4, 0, 2)):
        with pytest.raises(ValueError, match="num_rows % "):
            StreamRows(split, 8, rows, micro, rank, size)
    with pytest.raises(ValueError, match="a row needs two"):
        StreamRows(make_split(tmp_path / "short", 1), 8, 4, 2, 0, 1)
    with pytest.raises(ValueError, match="num_read_samples=6 is no multiple of the 4 rows"):
        next(training_streams(StreamRows(split, 8, 4, 2, 0, 1), 6))


def test_a_batch_is_of_the_file(tmp_path):
    split = make_split(tmp_path, 50)
    (batch,) = batches_of(split, 0, 1, rows=2, length=5, micro=2)
    assert np.array_equal(batch["tokens"].numpy(), [[0, 1, 2, 3, 4], [24, 25, 26, 27, 28]])
