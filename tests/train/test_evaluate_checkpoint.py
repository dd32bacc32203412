"""A checkpoint's scores are those that training logged, at other layouts too."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from images_run import VISION, prepare_digits
from labelled_folders import PRETRAINING, pretrained, recipes_of, tune_on, write_sst2
from small_run import ROOT, run_on

from vqmoe_megatron.train.evaluate_checkpoint import check_evaluation

pytestmark = pytest.mark.distributed


# Two microbatches of two rows; a memory longer than a segment.
STREAMS = ["model.attention=transformer_xl", "model.position_embedding_type=relative"]
STREAMS += ["model.memory_length_tokens=24", "train.micro_batch_size=2", "train.eval_iters=3"]


def scores_here(checkpoint: str, overrides: list[str], options: dict) -> list:
    import torch

    from vqmoe_megatron.train.evaluate_checkpoint import check_evaluation, scores_of

    options = {"split": "valid", "data": None, "stride_tokens": None, "max_windows": None} | options
    options["data"] = options["data"] and Path(options["data"])
    world_size = torch.distributed.get_world_size()
    asked = check_evaluation(Path(checkpoint), overrides, num_ranks=world_size, **options)
    windows, scores = scores_of(asked)
    return [windows, scores]


@pytest.fixture(scope="module")
def run(ranks, small_corpus, tmp_path_factory):
    """A pretrained run and the record of its last validation, of 2 * 4 windows."""
    out = tmp_path_factory.mktemp("evaluated") / "run"
    return out, pretrained(ranks(1), small_corpus, out)[-1]


def evaluated(pool, run_dir: Path, layout: dict[str, int], **options) -> list:
    overrides = [f"parallel.{name}={size}" for name, size in layout.items()]
    return pool.run(scores_here, str(run_dir), overrides, options, layout=layout)[0]


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        (1, {}),
        (2, {"expert_model_parallel_size": 2}),
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2}),
    ],
    ids=["one-rank", "ep2", "tp2", "pp2"],
)
def test_the_figure_is_that_of_training(num_ranks, layout, run, ranks) -> None:
    run_dir, last = run
    windows, scores = evaluated(ranks(num_ranks), run_dir, layout, max_windows=8)
    assert windows.startswith("window 16, stride 16 tokens, 8 of ")
    assert set(scores) == {"val/loss", "val/bits_per_byte", "val/perplexity"}
    exact = {} if num_ranks > 1 else {"rel": 1e-12}
    for name, value in scores.items():
        assert value == pytest.approx(last[name], **({"rel": 1e-6} | exact))


@pytest.fixture(scope="module")
def streams(ranks, small_corpus, tmp_path_factory):
    """A run with a memory, and the record of its last validation, of 3 segments of 4 rows."""
    out = tmp_path_factory.mktemp("streams") / "run"
    return out, pretrained(ranks(1), small_corpus, out, *STREAMS)[-1]


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [(1, {}), (2, {}), (2, {"pipeline_model_parallel_size": 2})],
    ids=["one-rank", "dp2", "pp2"],
)
def test_rows_are_read_with_their_memory(num_ranks, layout, streams, ranks) -> None:
    run_dir, last = streams
    said, scores = evaluated(ranks(num_ranks), run_dir, layout, max_windows=12)
    assert said.startswith("4 rows in order, segments of 16 tokens with up to 24 of memory")
    for name, value in scores.items():
        assert value == pytest.approx(last[name], rel=1e-6)
    with pytest.raises(ValueError, match="6 % 4 = 2; text is read in 4 rows as in training"):
        check_evaluation(run_dir, [], "valid", None, None, 6, None)


def test_other_splits_windows_and_texts(run, ranks, small_corpus) -> None:
    pool, run_dir = ranks(1), run[0]
    valid = evaluated(pool, run_dir, {}, max_windows=40)
    test = evaluated(pool, run_dir, {}, split="test", max_windows=40)
    strided = evaluated(pool, run_dir, {}, stride_tokens=8, max_windows=40)
    again = evaluated(pool, run_dir, {}, data=str(small_corpus), max_windows=40)
    assert valid[0].startswith("window 16, stride 16 tokens, 40 of")
    assert strided[0].startswith("window 16, stride 8 tokens, 40 of")
    assert valid[1] == again[1]
    assert len({found[1]["val/loss"] for found in (valid, test, strided)}) == 3


def test_a_fine_tuned_checkpoint_has_an_accuracy(run, ranks, tmp_path) -> None:
    texts = write_sst2(tmp_path / "texts")
    todo = recipes_of(run[0], texts, tmp_path / "out", ["discrete"])
    result = tune_on(ranks(1), todo.runs[0].recipe, todo.runs[0].run_dir, {})
    last = result["records"][-1]
    run_dir = todo.runs[0].run_dir
    for num_ranks, layout in ((1, {}), (2, {"expert_model_parallel_size": 2})):
        windows, scores = evaluated(ranks(num_ranks), run_dir, layout)
        assert windows.startswith("6 texts of dev, each in a window of 16 tokens, ")
        assert scores["val/accuracy"] == last["val/accuracy"]
        assert scores["val/loss"] == pytest.approx(last["val/loss"], rel=1e-6)
    windows, _ = evaluated(ranks(1), run_dir, {}, split="test")
    assert windows.startswith("5 texts of test")
    other = write_sst2(tmp_path / "other")
    (other / "dev.tsv").write_text("good\t1\n")
    windows, _ = evaluated(ranks(1), run_dir, {}, data=str(other))
    assert windows.startswith("1 texts of dev")
    (other / "train.tsv").write_text("good\t7\n")
    with pytest.raises(ValueError, match="label '7' is none of this data set's"):
        check_evaluation(run_dir, [], "valid", other, None, None, 1)
    with pytest.raises(ValueError, match="--stride and --max-windows are for running text"):
        check_evaluation(run_dir, [], "valid", None, 8, None, 1)


def test_images_have_an_accuracy_by_the_figures_of_training(ranks, tmp_path) -> None:
    digits, run_dir = prepare_digits(tmp_path), tmp_path / "run"
    settings = [*PRETRAINING, *VISION, "train.eval_iters=100", "data.eval_split=test"]
    last = run_on(ranks(1), digits, run_dir, settings, {})[0]["records"][-1]
    for num_ranks, layout in ((1, {}), (2, {"tensor_model_parallel_size": 2})):
        windows, scores = evaluated(ranks(num_ranks), run_dir, layout, split="test")
        assert windows == "359 of 359 images of test"
        assert scores["val/loss"] == pytest.approx(last["val/loss"], rel=1e-6)
        assert scores["val/accuracy"] == last["val/accuracy"]
    other = tmp_path / "other"
    shutil.copytree(digits, other)
    described = json.loads((other / "images.json").read_text())
    darker = described | {"channel_mean": [0.9], "channel_std": [0.1]}
    (other / "images.json").write_text(json.dumps(darker))
    found = evaluated(ranks(1), run_dir, {}, split="test", data=str(other), max_windows=90)
    assert found == evaluated(ranks(1), run_dir, {}, split="test", max_windows=90)
    turned = described | {"class_names": described["class_names"][::-1]}
    (other / "images.json").write_text(json.dumps(turned))
    with pytest.raises(ValueError, match="classes of .* are 9, 8, 7"):
        check_evaluation(run_dir, [], "test", other, None, None, 1)
    with pytest.raises(ValueError, match="every image is scored once"):
        check_evaluation(run_dir, [], "test", None, 4, None, 1)


@pytest.mark.parametrize(
    ("overrides", "options", "said"),
    [
        (["vq.num_codes=4"], {}, "only parallel."),
        ([], {"stride": 99}, "must lie in 1..seq_length"),
        ([], {"split": "train"}, "data.eval_split"),
        (["parallel.tensor_model_parallel_size=3"], {}, "cannot run on 3 ranks"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(overrides, options, said, run, ranks) -> None:
    arguments = {"split": "valid", "stride": None} | options
    with pytest.raises(ValueError) as refused:
        check_evaluation(
            run[0], overrides, arguments["split"], None, arguments["stride"], None, None
        )
    assert said in str(refused.value)


def test_no_checkpoint(tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        check_evaluation(tmp_path, [], "valid", None, None, None, None)


@pytest.mark.full
def test_the_command_starts_its_ranks_and_writes_what_it_prints(run, tmp_path) -> None:
    out = tmp_path / "scores.json"
    command = [sys.executable, "-m", "vqmoe_megatron.cli", "evaluate", str(run[0])]
    command += ["--max-windows", "8", "--nproc", "2", "--json", str(out)]
    command += ["parallel.expert_model_parallel_size=2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["scores"]["val/loss"] == pytest.approx(run[1]["val/loss"], rel=1e-6)
    assert f"{found['scores']['val/loss']:.6f}" in done.stdout
    assert found["windows"] in done.stdout
    out.write_text("mine")
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 2 and "is there already" in again.stderr
    assert out.read_text() == "mine"
