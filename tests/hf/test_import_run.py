"""An export becomes a run directory again: the same tensors, the same losses, at any layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fast_tier import only
from forked_vqmoe import vqmoe
from safetensors.torch import load_file, save_file
from small_run import ROOT, TINY, run_on

pytestmark = pytest.mark.distributed

TP, PP, EP = (f"{name}_model_parallel_size" for name in ("tensor", "pipeline", "expert"))
# The schedule ends where the export is made; behind it the rate is small.
STEPS = [*TINY, "optimizer.lr_warmup_iters=0", "optimizer.lr_decay_iters=6", "optimizer.lr=1e-2"]
SMOE = ["vq.path=continuous"]
MEMORY = ["code_memory.num_rows=64"]
PADDING = ["model.make_vocab_size_divisible_by=96"]
MODELS = {
    "default-ep2": (2, {EP: 2}, [*SMOE, *MEMORY, *PADDING, "code_memory.layers=[1]"]),
    "dual-tp2-ep2": (2, {TP: 2, EP: 2}, []),
    "smoe-pp2-ep2": (4, {PP: 2, EP: 2}, [*SMOE, "model.moe_router_topk=2"]),
    "discrete-product": (
        1, {}, ["vq.path=discrete", "vq.quantizer=product", "vq.num_code_slices=2"],
    ),
    "low-dim-norms": (1, {}, ["vq.quantizer=low_dim", "vq.code_dim=8", "vq.norm=separate"]),
    "cosine-learned-inputs": (1, {}, ["vq.quantizer=cosine", "vq.code_input=learned"]),
    "filled": (
        2,
        {EP: 2},
        ["vq.path=filled", "vq.norm=none", "vq.threshold_routing=true", "vq.fill_values=direct",
         "model.moe_router_topk=1"],
    ),
    "contexts": (
        2,
        {EP: 2},
        [*SMOE, *MEMORY, "code_memory.codes=embedding", "code_memory.num_codes=40",
         "code_memory.num_context_codes=6", "code_memory.context_dim=8", "code_memory.gate=token"],
    ),
    "rows-of-experts": (
        1,
        {},
        [*SMOE, *MEMORY, "code_memory.codes=hidden", "code_memory.num_codes=12",
         "code_memory.values=experts"],
    ),
    "modern": (
        2,
        {TP: 2},
        [*SMOE, "model.gated_linear_unit=true", "model.activation_func=silu",
         "model.normalization=RMSNorm", "model.add_bias_linear=false", "model.bf16=true",
         "model.moe_shared_expert_intermediate_size=48",
         "model.untie_embeddings_and_output_weights=false"],
    ),
    "dense-between": (
        1,
        {},
        [*SMOE, "model.num_layers=3", "model.moe_layer_freq=2", "model.ffn_hidden_size=48",
         "model.position_embedding_type=learned_absolute"],
    ),
}  # fmt: skip


def all_done(*commands: tuple[object, ...]) -> str:
    """Run ``vqmoe`` commands one after the other; return what they print."""
    printed = ""
    for command in commands:
        done = vqmoe(*command)
        assert done.returncode == 0, done.stderr[-3000:]
        printed += done.stdout
    return printed


def tensors(folder: Path) -> dict:
    return {
        f"{path.name.partition('-')[0]}: {name}": tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("name", only(MODELS, "default-ep2", "discrete-product"))
def test_an_imported_run_is_the_exported_one(name, ranks, small_corpus, tmp_path):
    num_ranks, layout, overrides = MODELS[name]
    every = [*STEPS, *overrides]
    run, again = tmp_path / "run", tmp_path / "again"
    run_on(ranks(num_ranks), small_corpus, run, [*every, "train.train_iters=6"], layout)
    printed = all_done(
        ("export", run, "--hf", tmp_path / "hf"),
        ("import", tmp_path / "hf", "--out", again),
        ("export", again, "--hf", tmp_path / "second"),
    )
    assert "anew: the optimizer's moments" in printed
    assert f"further by: vqmoe pretrain {again}/checkpoints/iter_0000006/run_config.yaml" in printed
    first, second = tensors(tmp_path / "hf"), tensors(tmp_path / "second")
    assert first.keys() == second.keys()
    for tensor in first:
        assert second[tensor].dtype == first[tensor].dtype, tensor
        assert second[tensor].equal(first[tensor]), tensor

    longer = [*every, "train.train_iters=9", "train.log_interval=1"]
    theirs, ours = (
        run_on(ranks(num_ranks), small_corpus, directory, longer, layout)
        for directory in (run, again)
    )
    assert ours[0]["iteration"] == theirs[0]["iteration"] == 9
    expected, found = ([r["loss"] for r in one[0]["records"]] for one in (theirs, ours))
    assert len(found) == 3
    # The first step's loss is the model's alone; it takes the next samples at the schedule's rate.
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    rates = [[r["learning_rate"] for r in one[0]["records"]] for one in (theirs, ours)]
    assert rates[0] == rates[1]
    assert all(loss < 1.2 * expected[0] for loss in found)


@pytest.fixture(scope="module")
def imported(ranks, small_corpus, tmp_path_factory) -> Path:
    """A folder with an export, ``hf``, and the run directory made of it, ``again``."""
    folder = tmp_path_factory.mktemp("imported")
    every = [*STEPS, *SMOE, *MEMORY, "train.train_iters=6"]
    run_on(ranks(1), small_corpus, folder / "run", every, {})
    all_done(
        ("export", folder / "run", "--hf", folder / "hf"),
        ("import", folder / "hf", "--out", folder / "again"),
    )
    return folder


def test_a_resumed_import_is_the_one_that_never_stopped(ranks, small_corpus, imported, tmp_path):
    ends = []
    for name, stops in (("at_once", [9]), ("in_two", [7, 9])):
        shutil.copytree(imported / "again", tmp_path / name)
        for stop in stops:
            more = [*STEPS, *SMOE, *MEMORY, f"train.train_iters={stop}", "train.log_interval=1"]
            (done,) = run_on(ranks(1), small_corpus, tmp_path / name, more, {})
        ends.append(done["records"][-1])
    assert ends[0]["loss"] == ends[1]["loss"] and ends[0]["grad_norm"] == ends[1]["grad_norm"]


def no_training_file(folder: Path) -> None:
    (folder / "training.json").unlink()


def other_weights(folder: Path) -> None:
    (path,) = folder.glob("model-*.safetensors")
    held = load_file(path)
    held["model.norm.weight"] += 1.0
    save_file(held, path, {"format": "pt"})


def no_weights(folder: Path) -> None:
    next(folder.glob("model-*.safetensors")).unlink()


def newer_format(folder: Path) -> None:
    path = folder / "training.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps(described | {"format_version": 2}))


def half_a_description(folder: Path) -> None:
    path = folder / "training.json"
    path.write_text(path.read_text()[:100])


def no_tensors_listed(folder: Path) -> None:
    path = folder / "training.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps(described | {"files": {}}))


def another_iteration(folder: Path) -> None:
    path = folder / "training.json"
    described = json.loads(path.read_text())
    described["progress"]["iteration"] += 1
    path.write_text(json.dumps(described))


DAMAGE = {
    another_iteration: "or was changed",
    no_training_file: "has no training.json: vqmoe export --hf did not write it",
    other_weights: "is not as it was written: its checksum differs",
    no_weights: "cannot be read (No such file or directory)",
    newer_format: "has format 2, this release reads 1",
    half_a_description: "damaged export",
    no_tensors_listed: "does not describe an export",
}


def test_unknown_and_damaged_folders_are_refused_before_anything_is_written(imported, tmp_path):
    from vqmoe_megatron.hf.import_run import import_hf

    for damage, words in DAMAGE.items():
        folder = tmp_path / damage.__name__
        shutil.copytree(imported / "hf", folder)
        damage(folder)
        with pytest.raises(ValueError) as refused:
            import_hf(folder, tmp_path / "again")
        assert words in str(refused.value), damage.__name__
    for place, words in ((tmp_path / "nothing", "does not exist"), (ROOT / "README.md", "is no")):
        with pytest.raises(ValueError, match=words):
            import_hf(place, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        import_hf(imported / "hf", tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["file"]
