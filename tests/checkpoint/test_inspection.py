"""What a checkpoint is said to hold equals what a real run wrote; broken folders are refused.

The tiny model: 2 layers, hidden 32, 8 experts of width 64, 16 codes, vocabulary 256, fp32.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import typer
from model_size import count_parameters
from small_run import PARITY, TINY, run_on
from typer.testing import CliRunner

from vqmoe_megatron.checkpoint.inspection import group_of, inspect_checkpoint
from vqmoe_megatron.cli.checkpoint import checkpoint_app

pytestmark = pytest.mark.distributed

L, H, F, N, K, V = 2, 32, 64, 8, 16, 256
EP2 = {"expert_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
NO_WARMUP = ["optimizer.lr_warmup_iters=0"]
STEPS = [*TINY, "train.train_iters=3", "checkpoint.save_interval=1", *NO_WARMUP]
STEPS += ["checkpoint.keep_last=2"]


@pytest.fixture(scope="module")
def run_dir(ranks, small_corpus, tmp_path_factory) -> Path:
    """A run on one rank with the checkpoints of iterations 2 and 3."""
    out = tmp_path_factory.mktemp("inspected")
    run_on(ranks(1), small_corpus, out, STEPS, {})
    return out


@pytest.fixture
def broken(run_dir, tmp_path) -> Path:
    """A copy of the newest checkpoint, to break."""
    return Path(
        shutil.copytree(run_dir / "checkpoints" / "iter_0000003", tmp_path / "iter_0000003")
    )


@pytest.fixture
def vqmoe():
    """Run ``vqmoe checkpoint ...`` in this process; a ValueError is raised as it is."""
    app = typer.Typer()
    app.add_typer(checkpoint_app, name="checkpoint")

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["checkpoint", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def by_group(contents) -> dict[str, int]:
    return {group.name: group.num_bytes for group in contents.groups}


def test_bytes_by_group_are_those_of_the_model(run_dir):
    contents = inspect_checkpoint(run_dir)
    attention = (3 * H * H + 3 * H) + (H * H + H)
    norms = 4 * 2 * H  # two of the block, two of the discrete path
    router, gate = N * H + N, 2 * H + 2
    dense = L * (attention + norms + router + gate) + 2 * H
    experts = L * N * (2 * F * H + F + H)
    trained = dense + experts + 2 * V * H
    assert by_group(contents) == {
        "dense layers": 4 * dense,
        "experts": 4 * experts,
        "codebooks: codes": 4 * L * K * H,
        "codebooks: EMA sums": 4 * L * K * H,
        "codebooks: usage": 4 * L * K,
        "codebooks: map and counters": L * (8 * K + 8 + 1),
        "embeddings and output": 4 * 2 * V * H,
        "optimizer state": 2 * 4 * trained,
        "random state": by_group(contents)["random state"],
    }
    assert contents.num_parameters == trained + L * K * H
    assert contents.tensor_bytes == sum(by_group(contents).values())
    assert contents.tensor_bytes < contents.disk_bytes
    files = (run_dir / "checkpoints" / "iter_0000003").iterdir()
    assert contents.disk_bytes == sum(file.stat().st_size for file in files)
    assert not torch.distributed.is_initialized()


def test_summary_says_what_was_run(run_dir):
    contents = inspect_checkpoint(run_dir)
    assert (contents.iteration, contents.progress["iteration"]) == (3, 3)
    assert contents.model["num_moe_experts"] == N and contents.model["vocab_size"] == V
    assert contents.vq["num_codes"] == K
    assert contents.layout["world_size"] == contents.layout["data_parallel_size"] == 1
    assert (contents.corpus, contents.tokenizer["kind"]) == ("text", "byte")
    assert isinstance(contents.format_version, int)
    recipe = (Path(contents.folder) / "run_config.yaml").read_bytes()
    assert contents.recipe_sha256 == hashlib.sha256(recipe).hexdigest()
    assert [found.name for found in contents.checkpoints] == ["iter_0000002", "iter_0000003"]
    assert contents.checkpoints[1].disk_bytes == contents.disk_bytes
    assert contents.incomplete == []


@pytest.mark.parametrize(
    ("overrides", "num_ranks", "layout"),
    [
        ([], 2, EP2),
        (["model.untie_embeddings_and_output_weights=false"], 2, PP2),
        (["model.bf16=true", "optimizer.use_distributed_optimizer=true"], 2, {}),
        (["model.gated_linear_unit=true", "model.moe_layer_freq=2"], 1, {}),
        (["vq.path=discrete", "vq.codebook_update=gradient"], 1, {}),
        (["vq.codebook_update=gradient", "vq.quantizer=product", "vq.num_code_slices=2"], 1, {}),
        (["vq.quantizer=low_dim", "vq.code_dim=8", "vq.train_projection=true"], 1, {}),
        pytest.param(
            *(["vq.quantizer=cosine", "vq.learn_code_scale=true"], 1, {}), marks=pytest.mark.full
        ),
    ],
    ids=[
        *("ep2", "tied-pp2", "bf16-distributed", "gated-dense", "discrete", "product"),
        *("trained-projection", "learned-scale"),
    ],
)
def test_parameters_are_those_of_the_model_at_any_layout(
    overrides, num_ranks, layout, ranks, small_corpus, tmp_path
):
    every = [*TINY, *overrides, "train.train_iters=1", *NO_WARMUP]
    run_on(ranks(num_ranks), small_corpus, tmp_path, every, layout)
    contents = inspect_checkpoint(tmp_path)
    (expected,) = ranks(1).run(count_parameters, str(PARITY), [*TINY, *overrides], layout={})
    assert contents.num_parameters == expected
    assert contents.layout["world_size"] == num_ranks
    for name, size in layout.items():
        assert contents.layout[name] == size
    assert all(group.name != "other" for group in contents.groups)
    if "model.bf16=true" in overrides:
        dtypes = {group.name: group.dtypes for group in contents.groups}
        assert dtypes["experts"] == ["bfloat16"]
        assert dtypes["codebooks: codes"] == ["float32"]  # whatever the model's dtype


def test_pieces_count_the_shards(ranks, small_corpus, tmp_path):
    run_on(ranks(2), small_corpus, tmp_path, [*TINY, "train.train_iters=1", *NO_WARMUP], EP2)
    tensors = {tensor.name: tensor for tensor in inspect_checkpoint(tmp_path).tensors}
    fc1 = tensors["decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    assert (fc1.shape, fc1.dtype, fc1.num_bytes) == ((L, N, F, H), "float32", 4 * L * N * F * H)
    assert fc1.num_pieces == L * 2  # each layer's experts on two ranks
    assert tensors["embedding.word_embeddings.weight"].num_pieces == 1


def test_run_directory_checkpoints_folder_and_iter_folder_mean_one(run_dir, monkeypatch):
    newest = run_dir / "checkpoints" / "iter_0000003"
    expected = asdict(inspect_checkpoint(newest))
    assert asdict(inspect_checkpoint(run_dir)) == expected
    assert asdict(inspect_checkpoint(run_dir / "checkpoints")) == expected
    assert inspect_checkpoint(run_dir / "checkpoints" / "iter_0000002").iteration == 2
    monkeypatch.chdir(newest)
    assert asdict(inspect_checkpoint(Path("."))) == expected


def test_json_holds_the_same_content(run_dir, vqmoe):
    expected = json.loads(json.dumps(asdict(inspect_checkpoint(run_dir))))
    assert json.loads(vqmoe("inspect", str(run_dir), "--json", "--tensors")) == expected
    del expected["tensors"]
    assert json.loads(vqmoe("inspect", str(run_dir), "--json")) == expected


def test_tables_show_numbers_and_stay_plain_in_a_log(run_dir, vqmoe, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    contents = inspect_checkpoint(run_dir)
    text = vqmoe("inspect", str(run_dir))
    assert "\x1b" not in text and "─" not in text
    lines = [line.split() for line in text.splitlines()]
    assert ["parameters", f"{contents.num_parameters:,}"] in lines
    assert ["on", "disk", f"{contents.disk_bytes:,}"] in lines
    experts = next(line for line in lines if line[:1] == ["experts"])
    assert experts[1:4] == ["4", f"{L * N * (2 * F * H + F + H):,}", "268,288"]
    assert "TP 1 PP 1 VPP 1 CP 1 EP 1 ETP 1 DP 1, world size 1" in text
    assert "optimizer.state" not in text
    listed = vqmoe("inspect", str(run_dir), "--tensors").splitlines()
    name = "decoder.layers.mlp.assigner.codebook.codes"
    line = next(line for line in listed if line.startswith(name))
    assert line.split() == [name, "[2,", "1,", "16,", "32]", "float32", "4,096", "2"]
    assert sum(any(line.startswith(t.name) for line in listed) for t in contents.tensors) == len(
        contents.tensors
    )


def test_help_has_an_example_and_costs_no_torch():
    code = (
        "import sys\nfrom vqmoe_megatron.cli.checkpoint import checkpoint_app\n"
        "try:\n    checkpoint_app(['inspect', '--help'])\n"
        "finally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Example: vqmoe checkpoint inspect runs/quickstart" in done.stdout


def test_unfinished_saves_are_listed_and_refused(run_dir):
    leftover = run_dir / "checkpoints" / "iter_0000009.incomplete"
    leftover.mkdir()
    try:
        (leftover / "__0_0.distcp").write_bytes(b"x" * 100)
        (found,) = inspect_checkpoint(run_dir).incomplete
        assert (found.name, found.disk_bytes) == ("iter_0000009.incomplete", 100)
        with pytest.raises(ValueError, match="is not finished: .* iter_0000002, iter_0000003"):
            inspect_checkpoint(leftover)
    finally:
        shutil.rmtree(leftover)


def test_what_names_no_checkpoint_is_told_what_would(run_dir, tmp_path):
    with pytest.raises(ValueError, match="does not exist; give a run directory"):
        inspect_checkpoint(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no complete one is in"):
        inspect_checkpoint(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        inspect_checkpoint(tmp_path / "file")
    started = run_dir / "checkpoints" / "iter_0000008"
    started.mkdir()
    try:
        with pytest.raises(ValueError, match="metadata.json, .* iter_0000002, iter_0000003"):
            inspect_checkpoint(started)
    finally:
        started.rmdir()


@pytest.mark.parametrize("name", ["run_config.yaml", "layout.json", "corpus.json", ".metadata"])
def test_a_missing_file_is_named(name, broken):
    (broken / name).unlink()
    with pytest.raises(ValueError, match=f"lacks {name}: it is damaged, or no checkpoint of vqmoe"):
        inspect_checkpoint(broken)


@pytest.mark.parametrize("name", ["layout.json", "corpus.json", ".metadata", "common.pt"])
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"a": 1', bytes(range(128, 192))],
    ids=["empty", "list", "half", "noise"],
)
def test_a_damaged_file_is_named(name, content, broken):
    (broken / name).write_bytes(content)
    with pytest.raises(ValueError, match="damaged checkpoint: .*" + name):
        inspect_checkpoint(broken)


def test_data_files_must_be_there_and_whole(broken):
    data = sorted(broken.glob("*.distcp"))[-1]
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{data.name} has {len(whole) - 1:,} bytes instead of"):
        inspect_checkpoint(broken)
    data.unlink()
    with pytest.raises(ValueError, match=f"{data.name} is missing"):
        inspect_checkpoint(broken)


class Payload:
    """Unpickled by anybody who trusts a checkpoint: writes the file ``ran``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder / "ran"),))


def test_code_hidden_in_the_index_is_refused_and_not_run(broken):
    (broken / ".metadata").write_bytes(pickle.dumps(Payload(broken)))
    with pytest.raises(ValueError, match=r"it names posix.mkdir, which is no part"):
        inspect_checkpoint(broken)
    assert not (broken / "ran").exists()


def test_common_values_that_are_not_plain_are_left_out_and_not_run(broken, vqmoe):
    torch.save({"progress": Payload(broken)}, broken / "common.pt")
    (broken / "checksums.json").unlink()  # as of a release before them
    contents = inspect_checkpoint(broken)
    assert contents.progress is contents.format_version is None
    assert "common.pt holds more than plain values" in vqmoe("inspect", str(broken))
    assert not (broken / "ran").exists()


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("optimizer.state.exp_avg.decoder.layers.mlp.experts.x.weight", "optimizer state"),
        ("decoder.layers.3.mlp.experts.experts.linear_fc2.bias", "experts"),
        ("decoder.layers.mlp.router.assigner.codebook.codes", "codebooks: codes"),
        ("decoder.layers.mlp.assigner.codebook.num_steps", "codebooks: map and counters"),
        ("decoder.layers.mlp.assigner.codebook.scale", "codebooks: codes"),
        ("decoder.layers.mlp.router.weight", "dense layers"),
        ("embedding.position_embeddings.weight", "embeddings and output"),
        ("something.else", "other"),
    ],
)
def test_groups_follow_names(name, group):
    assert group_of(name) == group
