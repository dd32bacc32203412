"""What we stream is, byte for byte, what Megatron's own builder writes."""

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from vqmoe_megatron.data import indexed_writer
from vqmoe_megatron.data.indexed_writer import IndexedWriter, token_dtype


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32"])
def test_files_equal_those_of_megatrons_builder(tmp_path, dtype):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 200, size) for size in (5, 1, 70_000, 3)]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=getattr(np, dtype))
    for document in documents:
        builder.add_item(torch.from_numpy(document))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    with IndexedWriter(tmp_path / "ours", dtype) as writer:
        for document in documents:
            for piece in np.array_split(document, 3):
                writer.write(piece)
            writer.end_document()
    for suffix in (".bin", ".idx"):
        ours, theirs = (tmp_path / (name + suffix) for name in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()
    assert (writer.num_documents, writer.num_tokens) == (4, 70_009)


def test_empty_document_leaves_no_trace_and_a_long_one_becomes_two_sequences(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed_writer, "MAX_SEQUENCE_TOKENS", 10)
    monkeypatch.setattr(indexed_writer, "INDEX_BLOCK", 2)
    with IndexedWriter(tmp_path / "x", "uint16") as writer:
        writer.end_document()
        writer.write(np.arange(25))
        writer.end_document()
        writer.write(np.arange(3))
        writer.end_document()
    dataset = IndexedDataset(str(tmp_path / "x"))
    assert dataset.sequence_lengths.tolist() == [10, 10, 5, 3]
    assert dataset.document_indices.tolist() == [0, 3, 4]
    sequences = [dataset[number] for number in range(4)]
    assert np.concatenate(sequences).tolist() == [*range(25), *range(3)]
    assert writer.num_documents == 2


def test_an_exception_leaves_no_index(tmp_path):
    with pytest.raises(KeyError), IndexedWriter(tmp_path / "x", "uint8") as writer:
        writer.write(np.arange(3))
        raise KeyError
    assert not (tmp_path / "x.idx").exists()


@pytest.mark.parametrize(
    ("vocab_size", "expected"),
    [(256, "uint8"), (257, "uint16"), (65499, "uint16"), (65500, "int32")],
)
def test_token_dtype(vocab_size, expected):
    assert token_dtype(vocab_size) == expected
