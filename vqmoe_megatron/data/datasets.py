"""Training microbatches: Megatron's GPTDataset over the train split, in an exactly resumable order.

1. The sample order (document order, sample starts, shuffle) follows from corpus, seed,
   ``seq_length`` and ``num_samples`` alone. As in Megatron, another ``num_samples`` that needs
   another number of epochs is another order.
2. Global rank 0 builds it in a private folder and renames that into ``CACHE/KEY``: other ranks,
   and other jobs on the same corpus, see it whole or not at all. CACHE is the first folder of
   :func:`~vqmoe_megatron.data.sample_order.cache_folders` that has it or can be written.
3. :class:`TrainBatches` walks the samples in order, dealing microbatches to data-parallel ranks:
   microbatch m of rank r holds samples ``consumed + (m * D + r) * b + [0, b)``, b the
   microbatch size and D the data-parallel size. A global batch is the same at every D.

Shapes: b = micro_batch_size, S = seq_length.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from vqmoe_megatron.data.corpus import CACHE_DIR, TOKENIZER_IDENTITY, Corpus, current_corpus
from vqmoe_megatron.data.sample_order import order_name


@dataclass(frozen=True)
class DatasetTokenizer:
    """What GPTDataset asks of a tokenizer.

    ``pad`` is no token (GPTDataset masks every label equal to it) and there is no ``eod``: masks
    and positions run across documents.
    """

    vocab_size: int
    unique_identifiers: dict[str, object]
    pad: int = -1
    eod: int | None = None


def build_training_dataset(
    corpus: Corpus,
    seq_length: int,
    num_samples: int,
    seed: int,
    is_built_on_rank: bool = True,
    cache_dirs: Sequence[Path] = (),
) -> GPTDataset | None:
    """Return at least ``num_samples`` samples of S + 1 tokens from the train split.

    Communicates: one barrier over the default group, so every rank must call it when
    torch.distributed is initialised; a rank that needs no data passes ``is_built_on_rank=False``
    and gets None. ``cache_dirs`` (default ``CORPUS/cache``) must be seen by all ranks. Raises
    ``ValueError`` for a train split shorter than one sample, for caches of which none can be
    written, and for a corpus that was replaced since it was loaded.
    """
    num_tokens = corpus.split("train").num_tokens
    if num_tokens < seq_length + 1:
        raise ValueError(
            f"the train split of {corpus.path} has {num_tokens} tokens, fewer than seq_length + 1 "
            f"= {seq_length + 1}; lower model.seq_length or prepare a larger corpus"
        )
    if num_samples < 1 or not 0 <= seed < 2**32:
        raise ValueError(
            f"need num_samples >= 1 and 0 <= seed < 2**32, "
            f"got num_samples={num_samples}, seed={seed}"
        )
    name = order_name(corpus, seq_length, num_samples, seed)
    places = [folder / name for folder in cache_dirs or (corpus.path / CACHE_DIR,)]
    distributed = torch.distributed.is_initialized()
    try:
        is_missing = not any(map(os.path.isdir, places))
        if is_missing and not (distributed and torch.distributed.get_rank()):
            _build_indices(current_corpus(corpus), seq_length, num_samples, seed, places)
    finally:
        if distributed:
            torch.distributed.barrier()
    if not is_built_on_rank:
        return None
    indices_dir = next(filter(os.path.isdir, places), None)
    if indices_dir is None:
        raise ValueError(
            f"this rank does not see {' or '.join(map(str, places))}: rank 0 could not write it, "
            "or it is not on a file system that all nodes share; set data.cache_dir=DIR to one"
        )
    dataset = _gpt_dataset(current_corpus(corpus), seq_length, num_samples, seed, indices_dir)
    current_corpus(corpus)
    return dataset


def _build_indices(
    corpus: Corpus, seq_length: int, num_samples: int, seed: int, places: Sequence[Path]
) -> None:
    """Build the sample order in a private folder and rename it to the first place that takes it."""
    refusals = []
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            private_dir = Path(tempfile.mkdtemp(prefix="building-", dir=place.parent))
        except OSError as error:
            refusals.append(f"{place.parent} ({error.strerror})")
            continue
        if refusals:
            print(
                f"the sample order is kept in {place.parent}, for this run alone: it cannot be "
                f"written to {' or '.join(refusals)}; data.cache_dir=DIR keeps it for all runs",
                flush=True,
            )
        try:
            _fill(private_dir, place, corpus, seq_length, num_samples, seed)
        except OSError as error:
            raise ValueError(
                f"cannot write the sample order to {place.parent} ({error}); free some room, or "
                "set data.cache_dir=DIR"
            ) from error
        finally:
            shutil.rmtree(private_dir, ignore_errors=True)
        return
    raise ValueError(
        f"cannot write the sample order to {' or '.join(refusals)}; make it writable, or set "
        "data.cache_dir=DIR"
    )


def _fill(
    private_dir: Path, place: Path, corpus: Corpus, seq_length: int, num_samples: int, seed: int
) -> None:
    private_dir.chmod(0o755)
    _gpt_dataset(corpus, seq_length, num_samples, seed, private_dir)
    try:
        os.rename(private_dir, place)
    except OSError:
        if not place.is_dir():  # else another job built the same order first
            raise


def _gpt_dataset(
    corpus: Corpus, seq_length: int, num_samples: int, seed: int, indices_dir: Path
) -> GPTDataset:
    prefix = str(corpus.split("train").prefix)
    identity = {key: corpus.tokenizer[key] for key in TOKENIZER_IDENTITY}
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(indices_dir),
        tokenizer=DatasetTokenizer(corpus.vocab_size, identity),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    low_level = GPTDataset.build_low_level_dataset(prefix, config)
    sequences = np.arange(GPTDataset.numel_low_level_dataset(low_level), dtype=np.int32)
    # The second argument only names the index files: the fingerprint lets a corpus be moved.
    return GPTDataset(low_level, corpus.fingerprint, sequences, num_samples, Split.train, config)


@dataclass(frozen=True)
class MicrobatchOrder:
    """The samples of each microbatch of one data-parallel rank; a DataLoader's batch sampler.

    ``passed_over_samples`` were left out for good: the order goes on behind them, and reads its own
    beginning again for as many samples at the end.
    """

    num_samples: int
    consumed_samples: int
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int
    passed_over_samples: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.data_parallel_rank < self.data_parallel_size or self.micro_batch_size < 1:
            raise ValueError(
                f"need 0 <= rank < size and micro_batch_size >= 1, got data_parallel_rank="
                f"{self.data_parallel_rank}, data_parallel_size={self.data_parallel_size}, "
                f"micro_batch_size={self.micro_batch_size}"
            )
        if not 0 <= self.consumed_samples <= self.num_samples:
            raise ValueError(
                f"consumed_samples={self.consumed_samples} is outside the {self.num_samples} "
                "samples of this run; was the checkpoint written with more train_iters?"
            )

    def __len__(self) -> int:
        stride = self.micro_batch_size * self.data_parallel_size
        return (self.num_samples - self.consumed_samples) // stride

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.micro_batch_size * self.data_parallel_size
        start = self.consumed_samples + self.passed_over_samples
        start += self.data_parallel_rank * self.micro_batch_size
        for number in range(len(self)):
            first = start + number * stride
            yield [(first + i) % self.num_samples for i in range(self.micro_batch_size)]


class TrainBatches:
    """Iterate over the microbatches of one data-parallel rank from ``consumed_samples`` on.

    Each is a dict of CPU tensors [b, S]: ``tokens``, ``labels``, ``position_ids`` int64, and
    ``loss_mask`` float32. Ends when fewer than b * D of the ``num_samples`` asked of the dataset
    are left. Does not communicate; ranks of one model replica pass the same arguments.
    """

    def __init__(
        self,
        dataset: GPTDataset,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        num_workers: int = 0,
        pin_memory: bool = False,
        passed_over_samples: int = 0,
    ) -> None:
        self.order = MicrobatchOrder(
            num_samples=dataset.num_samples,
            consumed_samples=consumed_samples,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
            passed_over_samples=passed_over_samples,
        )
        self._loader = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=self.order,
            num_workers=num_workers,
            pin_memory=pin_memory,
            # A private generator: iterating must not advance the global one, which draws dropout.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(self._loader)
