"""Training batches: real text, resumable anywhere, the same global batch at every layout."""

import multiprocessing
import shutil

import pytest
import torch

from vqmoe_megatron.data import datasets
from vqmoe_megatron.data.corpus import load_corpus
from vqmoe_megatron.data.datasets import TrainBatches, build_training_dataset

SEQ_LENGTH = 64
NUM_SAMPLES = 96


@pytest.fixture(scope="module")
def train_set(byte_corpus, tmp_path_factory):
    cache_dir = tmp_path_factory.mktemp("cache")
    return build_training_dataset(byte_corpus, SEQ_LENGTH, NUM_SAMPLES, 7, cache_dirs=[cache_dir])


def rows(batches):
    return [tuple(row.tolist()) for batch in batches for row in batch["tokens"]]


def test_batches_are_shifted_real_text(train_set, byte_corpus):
    text = byte_corpus.split("train").bin_path.read_bytes()
    batches = list(TrainBatches(train_set, 0, 4, 0, 1))
    assert len(batches) == NUM_SAMPLES // 4
    for batch in batches:
        assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
            "tokens": (torch.int64, (4, SEQ_LENGTH)),
            "labels": (torch.int64, (4, SEQ_LENGTH)),
            "loss_mask": (torch.float32, (4, SEQ_LENGTH)),
            "position_ids": (torch.int64, (4, SEQ_LENGTH)),
        }
        for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True):
            assert bytes([*tokens.tolist(), labels[-1].item()]) in text
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
        assert batch["loss_mask"].min() == 1
        assert torch.equal(batch["position_ids"][3], torch.arange(SEQ_LENGTH))
    assert len(set(rows(batches))) == NUM_SAMPLES


def test_token_zero_is_a_token(tmp_path):
    """Token 0 is neither padding nor end of document: its loss counts."""
    from vqmoe_megatron.data.prepare import prepare_corpus

    (tmp_path / "one").write_text("a" * 1000)  # the first of the characters
    corpus = prepare_corpus("text", tmp_path / "corpus", [tmp_path / "one"] * 2, "char")
    (batch,) = TrainBatches(build_training_dataset(corpus, 16, 2, 0), 0, 2, 0, 1)
    assert batch["labels"].max() == 0 and batch["loss_mask"].min() == 1


@pytest.mark.parametrize("consumed_samples", [0, 4, 20, 33, 92, 96])
def test_resuming_continues_the_same_stream(train_set, consumed_samples):
    whole = rows(TrainBatches(train_set, 0, 1, 0, 1))
    resumed = rows(TrainBatches(train_set, consumed_samples, 4, 0, 1))
    num_left = (NUM_SAMPLES - consumed_samples) // 4 * 4
    assert resumed == whole[consumed_samples : consumed_samples + num_left]


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 4), (2, 4), (4, 4), (4, 1), (2, 8)])
def test_global_batches_are_the_same_at_every_layout(train_set, dp_size, micro_batch_size):
    global_batch_size = 16
    whole = rows(TrainBatches(train_set, 0, 1, 0, 1))
    ranks = [
        iter(TrainBatches(train_set, 32, micro_batch_size, rank, dp_size))
        for rank in range(dp_size)
    ]
    for step in range(4):
        found = []
        for _ in range(global_batch_size // (micro_batch_size * dp_size)):
            for rank in ranks:
                found += rows([next(rank)])
        start = 32 + step * global_batch_size
        assert found == whole[start : start + global_batch_size]


def test_workers_do_not_change_the_order(train_set):
    alone = rows(TrainBatches(train_set, 8, 4, 1, 2))
    assert rows(TrainBatches(train_set, 8, 4, 1, 2, num_workers=2)) == alone


def test_iterating_leaves_the_global_random_state_alone(train_set):
    before = torch.get_rng_state()
    list(TrainBatches(train_set, 0, 4, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_decides_the_order_and_epochs_are_chained(byte_corpus, tmp_path):
    first, again, other = (
        build_training_dataset(byte_corpus, SEQ_LENGTH, 5000, seed, cache_dirs=[tmp_path / name])
        for seed, name in ((7, "a"), (7, "b"), (8, "c"))
    )
    streams = [rows(TrainBatches(dataset, 0, 8, 0, 1)) for dataset in (first, again, other)]
    assert streams[0] == streams[1] != streams[2]
    assert len(streams[0]) == 5000 > byte_corpus.split("train").num_tokens // SEQ_LENGTH


def test_the_order_is_built_once_and_survives_a_move(byte_corpus, tmp_path):
    path = shutil.copytree(byte_corpus.path, tmp_path / "corpus")
    build_training_dataset(load_corpus(path), SEQ_LENGTH, NUM_SAMPLES, 7)
    (indices_dir,) = (path / "cache").iterdir()
    built = {file.name: file.stat().st_mtime_ns for file in indices_dir.iterdir()}
    assert len(built) == 4
    moved = path.rename(tmp_path / "moved")
    build_training_dataset(load_corpus(moved), SEQ_LENGTH, NUM_SAMPLES, 7)
    (indices_dir,) = (moved / "cache").iterdir()
    assert {file.name: file.stat().st_mtime_ns for file in indices_dir.iterdir()} == built


def run_rank(rank, corpus_path, init_file, results):
    """One rank of a gloo world of three, or without ``init_file`` one of three lone jobs."""
    try:
        if init_file is not None:
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{init_file}", rank=rank, world_size=3
            )
        needed = rank != 1 or init_file is None
        dataset = build_training_dataset(
            load_corpus(corpus_path), SEQ_LENGTH, NUM_SAMPLES, 7, is_built_on_rank=needed
        )
        outcome = None if dataset is None else rows(TrainBatches(dataset, 0, 4, 0, 1))
    except ValueError as error:
        outcome = str(error)
    results.put((rank, outcome))
    results.close()
    results.join_thread()


def run_three(corpus_path, init_file):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=run_rank, args=(rank, corpus_path, init_file, results))
        for rank in range(3)
    ]
    for process in processes:
        process.start()
    outcomes = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return outcomes


@pytest.mark.parametrize("distributed", [True, False])
def test_processes_building_at_once_agree(byte_corpus, train_set, tmp_path, distributed):
    path = shutil.copytree(byte_corpus.path, tmp_path / "corpus")
    outcomes = run_three(path, tmp_path / "init" if distributed else None)
    expected = rows(TrainBatches(train_set, 0, 4, 0, 1))
    assert outcomes[0] == outcomes[2] == expected
    assert outcomes[1] == (None if distributed else expected)
    assert len(list((path / "cache").iterdir())) == 1


def test_the_second_of_two_jobs_keeps_the_first_ones_order(byte_corpus, tmp_path):
    indices_dir = tmp_path / "cache" / "key"
    built = []
    for _ in range(2):
        datasets._build_indices(byte_corpus, SEQ_LENGTH, NUM_SAMPLES, 7, [indices_dir])
        assert list(indices_dir.parent.iterdir()) == [indices_dir]
        built.append({file.name: file.stat().st_ino for file in indices_dir.iterdir()})
    assert built[0] == built[1] and len(built[0]) == 4


def test_no_rank_hangs_when_rank_zero_cannot_write(byte_corpus, tmp_path):
    path = shutil.copytree(byte_corpus.path, tmp_path / "corpus")
    (path / "cache").write_text("in the way")
    outcomes = run_three(path, tmp_path / "init")
    assert "cannot write the sample order" in outcomes[0]
    assert outcomes[1] is None
    assert "does not see" in outcomes[2]


def test_what_cannot_work_is_refused(byte_corpus, train_set, tmp_path):
    num_tokens = byte_corpus.split("train").num_tokens
    with pytest.raises(ValueError, match=f"has {num_tokens} tokens, fewer than seq_length"):
        build_training_dataset(byte_corpus, num_tokens, 1, 0, cache_dirs=[tmp_path])
    with pytest.raises(ValueError, match="seed=-1"):
        build_training_dataset(byte_corpus, 16, 1, -1, cache_dirs=[tmp_path])
    with pytest.raises(ValueError, match="consumed_samples=97 is outside the 96"):
        TrainBatches(train_set, NUM_SAMPLES + 1, 4, 0, 1)
    with pytest.raises(ValueError, match="data_parallel_rank=2"):
        TrainBatches(train_set, 0, 4, 2, 2)
