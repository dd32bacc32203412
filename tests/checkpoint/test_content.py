"""What is damaged is refused before the first write, with one sentence for every command."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_run import PARITY, TINY, run_on
from troubled_run import refusal_of_exporting, refusal_of_resuming

from vqmoe_megatron.checkpoint.content import check_format_version, read_content
from vqmoe_megatron.checkpoint.inspection import inspect_checkpoint
from vqmoe_megatron.config.recipe import load_recipe, save_recipe
from vqmoe_megatron.rundir.status import write_status
from vqmoe_megatron.train.preflight import check_run

pytestmark = pytest.mark.distributed

STEPS = [*TINY, "train.train_iters=3", "optimizer.lr_warmup_iters=0", "optimizer.lr_decay_iters=9"]
NEWEST = "iter_0000003"


@pytest.fixture(scope="module")
def completed(ranks, small_corpus, tmp_path_factory) -> Path:
    """The directory of a completed run of three iterations."""
    out = tmp_path_factory.mktemp("whole")
    run_on(ranks(1), small_corpus, out, STEPS, {})
    save_recipe(
        load_recipe(out / "checkpoints" / NEWEST / "run_config.yaml", []), out / "run_config.yaml"
    )
    write_status(out, "completed", 3, "all iterations done")
    (out / "metrics.jsonl").write_text('{"iteration": 3, "loss": 5.0}\n')
    return out


@pytest.fixture
def run_dir(completed, tmp_path) -> Path:
    return Path(shutil.copytree(completed, tmp_path / "run"))


def start(run_dir: Path, corpus: Path, *overrides: str):
    where = [f"data.path={corpus}", f"train.output_dir={run_dir}"]
    return check_run(load_recipe(PARITY, [*STEPS, *where, *overrides]), 1, "cpu")


def contents(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def cut(name: str, num_bytes: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (file,) = folder.glob(name)
        file.write_bytes(file.read_bytes()[:-num_bytes])

    return damage


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: next(folder.glob(name)).unlink()


def holding(name: str, content: bytes | str) -> Callable[[Path], None]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data) and None


def as_folder(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


LAYOUT = {"world_size": 0, "virtual_pipeline_model_parallel_size": None, "sequence_parallel": False}
LAYOUT |= {f"{name}_model_parallel_size": 1 for name in ("tensor", "pipeline", "expert")}
LAYOUT |= {"context_parallel_size": 1, "expert_tensor_parallel_size": 1}
DAMAGES = {
    "no common.pt": (removed("common.pt"), f"{NEWEST} lacks common.pt: it is damaged"),
    "common.pt a folder": (as_folder("common.pt"), f"{NEWEST} lacks common.pt"),
    "common.pt empty": (holding("common.pt", b""), "common.pt is not a file of torch"),
    "common.pt cut": (cut("common.pt", 200), "common.pt is not a file of torch"),
    "no index": (removed(".metadata"), f"{NEWEST} lacks .metadata: it is damaged"),
    "index cut": (cut(".metadata", 5), ".metadata cannot be read"),
    "index of something else": (holding(".metadata", pickle.dumps([1])), ".metadata is no index"),
    "data cut": (cut("__0_0.distcp", 2000), "__0_0.distcp has .* bytes instead of"),
    "data cut to nothing": (holding("__0_0.distcp", b""), "__0_0.distcp has 0 bytes instead of"),
    "no data": (removed("__0_0.distcp"), "__0_0.distcp is missing"),
    "metadata.json cut": (holding("metadata.json", "{"), "metadata.json cannot be read"),
    "metadata.json a list": (holding("metadata.json", "[]"), "metadata.json holds no object"),
    "metadata.json of nothing": (holding("metadata.json", "{}"), "metadata.json names the formats"),
    "metadata.json of zarr": (
        holding("metadata.json", '{"sharded_backend": "zarr", "common_backend": "torch"}'),
        "metadata.json names the formats .*zarr",
    ),
    "metadata.json empty": (holding("metadata.json", ""), "metadata.json is empty"),
    "no metadata.json": (removed("metadata.json"), "metadata.json is missing; copy metadata.json"),
    "no recipe": (removed("run_config.yaml"), f"{NEWEST} lacks run_config.yaml"),
    "recipe empty": (holding("run_config.yaml", ""), "run_config.yaml was emptied or cut"),
    "recipe no YAML": (holding("run_config.yaml", "a: [1"), "run_config.yaml cannot be used"),
    "recipe binary": (holding("run_config.yaml", b"\xff\x00"), "run_config.yaml cannot be used"),
    "recipe of a wrong value": (
        holding("run_config.yaml", "model: {num_layers: -1}"),
        "run_config.yaml cannot be used: .*num_layers=-1",
    ),
    "no layout": (removed("layout.json"), f"{NEWEST} lacks layout.json"),
    "layout of no ranks": (holding("layout.json", json.dumps(LAYOUT)), "layout.json describes no"),
    "layout of words": (
        holding("layout.json", json.dumps(LAYOUT | {"world_size": "two"})),
        "layout.json describes no layout",
    ),
    "layout of zero": (
        holding("layout.json", json.dumps(LAYOUT | {"pipeline_model_parallel_size": 0})),
        "layout.json describes no layout",
    ),
    "no corpus": (removed("corpus.json"), f"{NEWEST} lacks corpus.json"),
    "layout empty": (holding("layout.json", ""), "layout.json is empty"),
    "corpus empty": (holding("corpus.json", ""), "corpus.json is empty"),
    "corpus cut": (cut("corpus.json", 10), "corpus.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_one_sentence_before_the_first_write(damage, run_dir, small_corpus):
    make, says = DAMAGES[damage]
    make(run_dir / "checkpoints" / NEWEST)
    before = contents(run_dir)
    with pytest.raises(ValueError, match=says) as refused:
        start(run_dir, small_corpus)
    with pytest.raises(ValueError) as inspected:
        inspect_checkpoint(run_dir)
    assert str(inspected.value) == str(refused.value)
    assert contents(run_dir) == before


@pytest.mark.parametrize("overrides", [[], ["checkpoint.remap=true", "vq.num_codes=32"]])
def test_another_runs_damaged_checkpoint_is_no_start(overrides, run_dir, small_corpus, tmp_path):
    make, says = DAMAGES["data cut"]
    make(run_dir / "checkpoints" / NEWEST)
    with pytest.raises(ValueError, match=says):
        start(tmp_path / "new", small_corpus, f"checkpoint.load={run_dir}", *overrides)
    assert contents(tmp_path / "new") == {}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"format_version": 1}, "has checkpoint format 1, this release reads 2"),
        ({}, "has checkpoint format None"),
        ([2], "has checkpoint format None"),
    ],
)
def test_a_format_that_cannot_be_loaded_is_refused_though_it_can_be_described(
    values, says, run_dir, small_corpus
):
    folder = run_dir / "checkpoints" / NEWEST
    torch.save(values, folder / "common.pt")
    (folder / "checksums.json").unlink()  # as of a release before them
    with pytest.raises(ValueError, match=says):
        start(run_dir, small_corpus)
    inspect_checkpoint(run_dir)


@pytest.mark.parametrize(
    ("tracker", "says"),
    [
        (b"", "holds ''"),
        (b"release\n", "holds 'release'"),
        (b"0\n", "names iter_0000000, but that checkpoint is missing"),
        (b"99999999999", "names iter_99999999999, but"),
        (None, "is missing beside iter_0000003"),
    ],
)
def test_a_tracker_that_does_not_lead_to_the_checkpoint_is_refused(
    tracker, says, run_dir, small_corpus
):
    file = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    file.unlink()
    if tracker is not None:
        file.write_bytes(tracker)
    before = contents(run_dir)
    for command in (lambda: start(run_dir, small_corpus), lambda: inspect_checkpoint(run_dir)):
        with pytest.raises(ValueError, match=says) as refused:
            command()
        assert "write the iteration of a complete one into" in str(refused.value)
        assert "iter_0000003" in str(refused.value)
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.train_iters=2"], "train.train_iters=2 is less than the 3 iterations"),
        (["train.seed=99"], "train.seed: checkpoint 1234, recipe 99"),
        (["optimizer.lr_decay_iters=8"], "optimizer.lr_decay_iters: checkpoint 9, recipe 8"),
        (["model.seq_length=400000"], "split train of .* has .* tokens, this recipe needs 400001"),
    ],
)
def test_a_recipe_that_ranks_would_refuse_is_refused_before(overrides, says, run_dir, small_corpus):
    before = contents(run_dir)
    with pytest.raises(ValueError, match=says):
        start(run_dir, small_corpus, *overrides)
    assert contents(run_dir) == before


def test_what_is_whole_is_gone_on_with(run_dir, small_corpus):
    assert start(run_dir, small_corpus).resume_from == run_dir / "checkpoints" / NEWEST
    start(run_dir, small_corpus, "train.train_iters=3", "train.eval_iters=1")
    content = read_content(run_dir / "checkpoints" / NEWEST)
    check_format_version(run_dir, content)
    assert content.common["progress"]["iteration"] == 3


def test_without_checksums_data_that_is_no_tensor_is_a_sentence_too(
    ranks, run_dir, small_corpus, tmp_path
):
    folder = run_dir / "checkpoints" / NEWEST
    (folder / "checksums.json").unlink()
    file = folder / "__0_0.distcp"
    file.write_bytes(b"\x01" * file.stat().st_size)
    every = [*STEPS, f"data.path={small_corpus}", f"train.output_dir={run_dir}"]
    (resumed,) = ranks(1).run(refusal_of_resuming, str(PARITY), every)
    (exported,) = ranks(1).run(refusal_of_exporting, str(run_dir), str(tmp_path / "tables"))
    for said in (resumed, exported):
        assert said.startswith(f"damaged checkpoint: {folder} holds tensors that cannot be read")
        assert "weights_only" not in said  # torch's advice is to trust what is damaged
    assert not (tmp_path / "tables").exists()
