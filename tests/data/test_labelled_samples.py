"""Samples and evaluation windows of labelled texts: last positions, orders, what is cut."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.data.labelled_samples import EncodedTexts, LabelledSamples, LabelledWindows
from vqmoe_megatron.data.labelled_texts import LabelledText
from vqmoe_megatron.data.tokenizers import ByteTokenizer

TEXTS = EncodedTexts(
    [LabelledText(text, n % 2, f"f:{n}") for n, text in enumerate(("ab", "c", "defghi", "jk"))],
    ByteTokenizer(),
)


def test_a_sample_ends_where_its_text_ends() -> None:
    sample = TEXTS.sample(0, 4)
    assert sample["tokens"].tolist() == [97, 98, 0, 0]
    assert (int(sample["last"]), int(sample["labels"]), float(sample["loss_mask"])) == (1, 0, 1.0)
    cut = TEXTS.sample(2, 4)
    assert (cut["tokens"].tolist(), int(cut["last"])) == ([100, 101, 102, 103], 3)
    assert (TEXTS.num_cut(4), TEXTS.longest) == (1, 6)
    assert TEXTS.padding_share(4) == pytest.approx(1 - 9 / 16)
    assert TEXTS.majority_share == 0.5


def test_every_pass_reads_every_text_in_another_order() -> None:
    samples = LabelledSamples(TEXTS, 4, num_samples=400, seed=3)
    passes = [tuple(samples.text_of(p * 4 + i) for i in range(4)) for p in range(100)]
    assert {tuple(sorted(order)) for order in passes} == {(0, 1, 2, 3)}
    assert len(set(passes)) > 10
    again = LabelledSamples(TEXTS, 4, num_samples=800, seed=3)
    assert again.text_of(205) == passes[51][1]  # from the middle, and of a longer run
    others = LabelledSamples(TEXTS, 4, 400, seed=4)
    assert [others.text_of(i) for i in range(40)] != [samples.text_of(i) for i in range(40)]


@pytest.mark.parametrize(("micro", "dp"), [(1, 1), (3, 1), (1, 2), (4, 2)])
def test_every_text_is_scored_once(micro: int, dp: int) -> None:
    ranks = [LabelledWindows(TEXTS, "valid", 4, micro, rank, dp) for rank in range(dp)]
    batches = [batch for rank in ranks for batch in rank]
    assert {len(rank) for rank in ranks} == {len(batches) // dp}
    scored = [
        int(row[0])
        for batch in batches
        for row, mask in zip(batch["tokens"], batch["loss_mask"], strict=True)
        if mask
    ]
    assert sorted(scored) == [97, 99, 100, 106]
    assert all(batch["labels"].shape == (micro,) for batch in batches)
    assert all(batch["tokens"].dtype == torch.int64 for batch in batches)
    said = "4 texts of dev, each in a window of 4 tokens, 43.8% of them filling; 1 texts cut"
    assert ranks[0].description == said
