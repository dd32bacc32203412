"""The command's runs: refused before the first write, gone on with, and their table."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from labelled_folders import TUNING, pretrained, recipes_of, write_sst2
from small_run import ROOT

from vqmoe_megatron.config.recipe import load_saved_recipe, save_recipe
from vqmoe_megatron.finetune.runs import check_finetuning, write_recipes, write_table
from vqmoe_megatron.finetune.table import table_rows
from vqmoe_megatron.study.report.intervals import student_t_quantile
from vqmoe_megatron.train.preflight import check_run

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def start(ranks, small_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    pretrained(ranks(1), small_corpus, folder / "run")
    return folder / "run", write_sst2(folder / "texts")


@pytest.fixture(scope="module")
def continuous(ranks, small_corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("continuous") / "run"
    pretrained(ranks(1), small_corpus, out, "vq.path=continuous")
    return out


def checked(start, out: Path, **changed):
    options = {"dataset": "sst2", "modes": ["full"], "seeds": [1], "overrides": TUNING} | changed
    checkpoint = options.pop("checkpoint", start[0])
    data = options.pop("data", start[1])
    return check_finetuning(checkpoint, data=data, out=out, num_ranks=None, **options)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"modes": ["full", "full"]}, "--mode full,full: name each once"),
        ({"modes": ["router"]}, "choose one of full, continuous, discrete, head"),
        ({"seeds": [1, 1]}, "--seeds 1,1: name each once"),
        ({"dataset": "cola"}, "choose one of sst2"),
        ({"data": Path("/nowhere")}, "is no directory"),
        ({"overrides": [*TUNING, "train.seed=3"]}, "sets train.seed itself"),
        ({"overrides": [*TUNING, "finetune.mode=head"]}, "sets finetune.mode itself"),
        ({"overrides": [*TUNING, "train.eval_iters=0"]}, "is of all dev texts"),
        ({"overrides": [*TUNING, "data.eval_split=test"]}, "is of all dev texts"),
        ({"overrides": [*TUNING, "model.hidden_size=64"]}, "model.hidden_size: checkpoint 32"),
        ({"overrides": [*TUNING, "vq.freeze_codebook=false"]}, "vq.freeze_codebook=true"),
        ({"overrides": [*TUNING, "parallel.context_parallel_size=2"]}, "context_parallel_size"),
        ({"overrides": [*TUNING, "data.path=/nowhere"]}, "no corpus directory /nowhere"),
        ({"checkpoint": Path("/nowhere")}, "holds no complete checkpoint"),
    ],
)
def test_refusals_come_before_the_first_write(changed, said, start, tmp_path) -> None:
    with pytest.raises(ValueError) as refused:
        checked(start, tmp_path / "out", **changed)
    assert said in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_a_discrete_path_cannot_do_that_mode(
    continuous, start, tmp_path
) -> None:
    with pytest.raises(ValueError, match="vq.path=continuous, no discrete path; choose full or"):
        checked(start, tmp_path / "out", checkpoint=continuous, modes=["full", "discrete"])
    assert list(tmp_path.iterdir()) == []
    assert checked(start, tmp_path / "out", checkpoint=continuous).runs[0].mode == "full"


def test_a_folder_is_gone_on_with_only_as_it_was_begun(start, tmp_path) -> None:
    out = tmp_path / "out"
    first = checked(start, out, modes=["full", "head"], seeds=[1, 2])
    assert [run.name for run in first.runs] == [
        *("full_seed_1", "full_seed_2"), *("head_seed_1", "head_seed_2")
    ]  # fmt: skip
    write_recipes(first)
    more = checked(start, out, modes=["head"], seeds=[1, 2, 3])
    write_recipes(more)
    assert len(list((out / "recipes").iterdir())) == 5
    with pytest.raises(ValueError, match="says something else"):
        checked(start, out, overrides=[*TUNING, "optimizer.lr=3e-3"])
    (out / "finetune.json").write_text("{}")
    with pytest.raises(ValueError, match="is there already"):
        checked(start, out)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        checked(start, mine)
    (mine / "recipes").mkdir()
    (mine / "recipes" / "quickstart.yaml").write_text("{}")
    with pytest.raises(ValueError, match="is not empty"):
        checked(start, mine)


def test_a_recipe_names_the_classes_that_its_texts_give(start, tmp_path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    names = ("1.0", "it's: 1", "yes")  # sorted; a recipe must give them back as they are
    for split in ("train", "dev"):
        rows = "".join(f"a text,{name}\n" for name in reversed(names))
        (texts / f"{split}.csv").write_text(f"text,category\n{rows}")
    todo = checked(start, tmp_path / "out", dataset="banking77", data=texts)
    write_recipes(todo)
    assert load_saved_recipe(todo.runs[0].recipe).finetune.classes == list(names)
    checked(start, tmp_path / "out", dataset="banking77", data=texts)  # says the same
    saved = load_saved_recipe(todo.runs[0].recipe)
    before = replace(saved, finetune=replace(saved.finetune, classes=None))
    save_recipe(before, todo.runs[0].recipe)  # as before names were kept
    checked(start, tmp_path / "out", dataset="banking77", data=texts)
    assert checked(start, tmp_path / "other").runs[0].config.finetune.classes is None
    for split in ("train", "dev"):
        (texts / f"{split}.csv").write_text("text,category\na,yes\nb,${it}\n")
    with pytest.raises(ValueError, match=r"has the class '\$\{it\}': .*; rename the class"):
        checked(start, tmp_path / "other", dataset="banking77", data=texts)


def write_test_file(run, **changed) -> None:
    """As ``vqmoe evaluate --split test --json`` writes it about the run's last checkpoint."""
    content = {
        "command": "vqmoe evaluate",
        "checkpoint": str(run.run_dir / "checkpoints" / "iter_0000006"),
        "iteration": 6,
        "data": run.config.finetune.path,
        "split": "test",
        "scores": {"val/accuracy": 0.5},
    }
    run.test_file.parent.mkdir(exist_ok=True)
    run.test_file.write_text(json.dumps(content | changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"checkpoint": "out/head_seed_1/checkpoints/iter_0000006"},
        {"iteration": 3},
        {"command": "vqmoe bench"},
        {"split": "valid"},
        {"data": "other"},
        {"scores": [1]},
    ],
)
def test_scores_of_something_else_are_no_run_s_scores(changed, start, tmp_path) -> None:
    (run,) = recipes_of(*start, tmp_path / "out", ["full"]).runs
    assert run.test_scores() is None
    write_test_file(run)
    assert run.test_scores() == {"val/accuracy": 0.5}
    write_test_file(run, **changed)
    with pytest.raises(ValueError, match="is there already, and vqmoe finetune did not write it"):
        checked(start, tmp_path / "out")
    run.test_file.unlink()
    run.test_file.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is there already, and vqmoe finetune did not write it"):
        checked(start, tmp_path / "out")


def test_the_table_has_intervals_over_seeds_and_paired_differences(start, tmp_path) -> None:
    todo = recipes_of(*start, tmp_path / "out", ["full", "head"], seeds=[1, 2])
    dev = {("full", 1): 0.8, ("full", 2): 0.9, ("head", 1): 0.5, ("head", 2): 0.7}
    for run in todo.runs:
        run.run_dir.mkdir()
        record = {"val/loss": 0.5, "val/accuracy": dev[run.mode, run.seed]}
        lines = [{"val/accuracy": 0.0, "val/loss": 9.0}, record, {"loss": 1.0}]
        (run.run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        write_test_file(run, scores=record)
    full, head = table_rows(todo)
    t = student_t_quantile(1)
    assert full["dev"]["mean"] == pytest.approx(0.85)
    assert full["dev"]["half_width_95"] == pytest.approx(t * 0.1 / 2)
    apart = head["minus_first_mode"]["test"]
    assert apart["values"] == pytest.approx([-0.3, -0.2])
    assert apart["half_width_95"] == pytest.approx(t * 0.1 / 2)
    assert full["trainable_parameters"] > head["trainable_parameters"] == 66
    content = json.loads(write_table(todo, [full, head]).read_text())
    assert content["texts"]["train"]["texts"] == 8
    assert 0 < content["texts"]["train"]["padding_share"] < 1


@pytest.mark.full
def test_the_command_trains_tests_and_goes_on(start, tmp_path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "vqmoe_megatron.cli", "finetune", str(start[0])]
    command += ["--task", "sst2", "--data", str(start[1]), "--out", str(out)]
    command += ["--mode", "full,discrete", "--seeds", "1,2", *TUNING, "checkpoint.save_interval=0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "discrete minus full, paired by seed: dev" in done.stdout
    rows = json.loads((out / "finetune.json").read_text())["rows"]
    assert [len(row["test"]["values"]) for row in rows] == [2, 2]
    assert json.loads((out / "full_seed_1" / "status.json").read_text())["state"] == "completed"
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 0 and again.stdout.count("done before") == 4
    assert json.loads((out / "finetune.json").read_text())["rows"] == rows
    # A run whose directory is gone is trained and tested anew: old scores do not stand for it.
    shutil.rmtree(out / "full_seed_1")
    old = out / "test" / "full_seed_1.json"
    scores = json.loads(old.read_text())
    old.write_text(json.dumps(scores | {"scores": {"val/accuracy": -1.0}}))
    anew = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert anew.returncode == 0 and anew.stdout.count("done before") == 3
    assert json.loads(old.read_text())["scores"] == scores["scores"]
    assert json.loads((out / "finetune.json").read_text())["rows"] == rows


def test_changed_texts_are_refused_before_ranks_start(start, tmp_path) -> None:
    texts = write_sst2(tmp_path / "texts")
    todo = recipes_of(start[0], texts, tmp_path / "out", ["full"])
    config = todo.runs[0].config
    assert check_run(config, 1, "cpu").remap_from == todo.checkpoint
    (texts / "dev.tsv").write_text("other\t1\n")
    with pytest.raises(ValueError, match="have changed"):
        check_run(config, 1, "cpu")
