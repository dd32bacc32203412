"""A model with exported tables in its layers' places gives the checkpoint's own logits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from fast_tier import only
from safetensors import safe_open
from small_run import PARITY, ROOT, TINY, run_on
from table_model import export_here, logits_here
from typer.testing import CliRunner

from vqmoe_megatron import registry
from vqmoe_megatron.checkpoint.table_export import check_has_table
from vqmoe_megatron.checkpoint.table_folder import sha256
from vqmoe_megatron.cli.export import export
from vqmoe_megatron.config import CodeMemoryConfig, VQConfig
from vqmoe_megatron.vq.memory_tables import load_code_memory
from vqmoe_megatron.vq.row_addresses import row_ids

pytestmark = pytest.mark.distributed

EP2 = {"expert_model_parallel_size": 2}
STEPS = [*TINY, "train.train_iters=6", "optimizer.lr_warmup_iters=0", "optimizer.lr=1e-2"]
DISCRETE = [*STEPS, "vq.path=discrete", "vq.quantizer=product", "vq.num_code_slices=2"]
DENSE_BETWEEN = [*STEPS, "model.num_layers=3", "model.moe_layer_freq=2", "vq.quantizer=cosine"]
BF16 = [*STEPS, "vq.path=discrete", "model.bf16=true", "vq.code_input=learned"]


def with_tables(pool, corpus: Path, run_dir: Path, overrides: list[str], tables: Path) -> dict:
    every = [f"data.path={corpus}", f"train.output_dir={run_dir}", *overrides]
    return pool.run(logits_here, str(PARITY), every, str(tables))[0]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def discrete_run(ranks, small_corpus, tmp_path_factory) -> Path:
    """A run of 6 steps at EP = 2, path=discrete, two slices."""
    out = tmp_path_factory.mktemp("discrete")
    run_on(ranks(2), small_corpus, out, DISCRETE, EP2)
    return out


@pytest.fixture(scope="module")
def exported(discrete_run, tmp_path_factory) -> tuple[Path, str]:
    """Its tables, written by the real command, and what that printed."""
    out = tmp_path_factory.mktemp("exported") / "tables"
    done = subprocess.run(
        [sys.executable, "-m", "vqmoe_megatron.cli", "export", discrete_run, "--tables", out],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_tables_give_the_logits_of_a_checkpoint_of_two_ranks(
    exported, discrete_run, ranks, small_corpus
):
    found = with_tables(ranks(1), small_corpus, discrete_run, DISCRETE, exported[0])
    assert "another layout" in found["said"][0]  # written at EP = 2, read on one rank
    assert found["numbers"] == [1, 2]
    assert torch.equal(found["tables"], found["model"])
    assert relative_error(found["wrong"], found["model"]) > 1e-2


def test_a_dual_layer_needs_its_continuous_path_and_the_table(ranks, small_corpus, tmp_path):
    run_on(ranks(1), small_corpus, tmp_path / "run", DENSE_BETWEEN, {})
    out = tmp_path / "tables"
    (written,) = ranks(1).run(export_here, str(tmp_path / "run"), str(out))
    assert written["replaced"] == [0, 0]
    found = with_tables(ranks(1), small_corpus, tmp_path / "run", DENSE_BETWEEN, out)
    assert found["numbers"] == [1, 3]
    assert relative_error(found["tables"], found["model"]) < 1e-5
    assert relative_error(found["wrong"], found["model"]) > 1e-2


def test_bf16_tables_give_the_same_rounding(ranks, small_corpus, tmp_path):
    run_on(ranks(1), small_corpus, tmp_path / "run", BF16, {})
    ranks(1).run(export_here, str(tmp_path / "run"), str(tmp_path / "tables"))
    found = with_tables(ranks(1), small_corpus, tmp_path / "run", BF16, tmp_path / "tables")
    assert torch.equal(found["tables"], found["model"])
    assert relative_error(found["wrong"], found["model"]) > 1e-2


TOKENS = ["code_memory.num_rows=64", "code_memory.codes=tokens"]
MEMORY = [
    "code_memory.num_rows=64", "code_memory.codes=embedding", "code_memory.num_codes=40",
    "code_memory.lr_mult=5",
]  # fmt: skip
MEMORIES = {
    "contexts and gate, two slices, written at EP 2": (
        2,
        [
            *DISCRETE, *MEMORY, "code_memory.num_context_codes=6", "code_memory.context_dim=8",
            "code_memory.gate=token", "code_memory.layers=[2]",
        ],
    ),
    "hidden states, dual": (
        1, [*STEPS, *MEMORY, "code_memory.codes=hidden", "code_memory.max_order=2"],
    ),
    "rows that experts make, bf16": (
        1, [*BF16, *TOKENS, "code_memory.values=experts"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", only(MEMORIES, *list(MEMORIES)[:2]))
def test_tables_and_memory_give_the_logits_of_the_checkpoint(name, ranks, small_corpus, tmp_path):
    num_ranks, overrides = MEMORIES[name]
    run_dir, out = tmp_path / "run", tmp_path / "tables"
    run_on(ranks(num_ranks), small_corpus, run_dir, overrides, EP2 if num_ranks == 2 else {})
    ranks(1).run(export_here, str(run_dir), str(out))
    found = with_tables(ranks(1), small_corpus, run_dir, overrides, out)
    # A gate's product is rounded by how tokens lie: batch first here, sequence first in the layer.
    if "vq.path=discrete" in overrides and "code_memory.gate=token" not in overrides:
        assert torch.equal(found["tables"], found["model"])
    assert relative_error(found["tables"], found["model"]) < 1e-5
    for wrong in ("wrong", "wrong memory"):
        assert relative_error(found[wrong], found["model"]) > 1e-3
    numbers = [2] if "code_memory.layers=[2]" in overrides else [1, 2]
    index = json.loads((out / "tables.json").read_text())
    assert index["code_memory_file"]["name"] == "code_memory.safetensors"
    of_layers = [layer["code_memory_file"] for layer in index["layers"]]
    names = [file["name"] for file in of_layers if file]
    assert names == [f"memory_{number:04d}.safetensors" for number in numbers]
    written = sorted(path.name for path in out.glob("*.safetensors"))
    tables = ["layer_0001.safetensors", "layer_0002.safetensors"]
    assert written == ["code_memory.safetensors", *tables, *names]
    assert index["total_bytes"] == sum((out / name).stat().st_size for name in written)
    for file in [index["code_memory_file"], *filter(None, of_layers)]:
        assert file["sha256"] == sha256(out / file["name"])


def test_beside_a_continuous_path_the_memory_is_all(ranks, small_corpus, tmp_path):
    """Rows as they are trained, found as the model finds them."""
    memory = [*TOKENS, "code_memory.layers=[2]"]
    run_dir, out = tmp_path / "run", tmp_path / "tables"
    run_on(ranks(1), small_corpus, run_dir, [*STEPS, *memory, "vq.path=continuous"], {})
    ranks(1).run(export_here, str(run_dir), str(out))
    names = ["code_memory.safetensors", "memory_0002.safetensors", "tables.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    (layer,) = json.loads((out / "tables.json").read_text())["layers"]
    assert (layer["layer"], layer["file"], layer["num_rows"]) == (2, None, 0)
    found = load_code_memory(out)
    assert list(found.layers) == [2] and found.layers[2].rows.abs().max() > 0
    tokens = torch.arange(12).view(1, 12)
    starts = torch.zeros(1, 12, dtype=torch.bool)
    rows = found.codes.row_ids(tokens, starts)
    assert torch.equal(rows, row_ids(tokens, starts, num_rows=64, max_order=3))
    x = torch.zeros(1, 12, found.layers[2].rows.shape[1])
    read = found.layers[2].rows[rows].sum(dim=2)
    torch.testing.assert_close(found.adds(2, x, tokens, starts), read)
    assert found.adds(1, x, tokens, starts) is None


def test_the_index_describes_the_files(exported, discrete_run):
    out, _ = exported
    index = json.loads((out / "tables.json").read_text())
    assert index["checkpoint"]["folder"] == str(discrete_run / "checkpoints" / "iter_0000006")
    assert index["checkpoint"]["iteration"] == 6
    assert index["vq"]["num_code_slices"] == 2 and index["model"]["hidden_size"] == 32
    names = ["layer_0001.safetensors", "layer_0002.safetensors"]
    assert [layer["file"] for layer in index["layers"]] == names
    assert sorted(entry.name for entry in out.iterdir()) == [*names, "tables.json"]
    for number, layer in enumerate(index["layers"], start=1):
        path = out / layer["file"]
        assert layer["layer"] == number
        assert layer["num_rows"] == 2 * 16
        assert layer["num_bytes"] == path.stat().st_size
        assert layer["sha256"] == sha256(path)
        assert layer["replaced_expert_bytes"] == 4 * 8 * (2 * 64 * 32 + 64 + 32)
        with safe_open(path, framework="pt") as file:
            shapes = {name: list(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        assert shapes == {
            "codes": [2, 16, 16],
            "table": [32, 32],
            "output_norm.weight": [32],
            "output_norm.bias": [32],
        }
        assert {name: part["shape"] for name, part in layer["tensors"].items()} == shapes
        assert metadata["iteration"] == "6" and metadata["layer_number"] == str(number)


def test_the_command_prints_one_line_per_layer(exported):
    out, shown = exported
    assert "exporting on cpu" in shown
    lines = [line.split() for line in shown.splitlines()]
    for number in (1, 2):
        name = f"layer_000{number}.safetensors"
        size = f"{(out / name).stat().st_size:,}"
        assert [name, str(number), "32", size, "134,144", "134,144"] in lines
    assert "in place of 268,288 bytes of experts" in shown


@pytest.fixture
def refused():
    """Run the command in this process; it must refuse, and the message is returned."""
    app = typer.Typer()
    app.command()(export)

    def run(checkpoint: Path, out: Path) -> str:
        with pytest.raises(ValueError) as error:
            arguments = [str(checkpoint), "--tables", str(out)]
            CliRunner().invoke(app, arguments, catch_exceptions=False)
        return str(error.value)

    return run


def test_a_folder_with_something_in_it_is_refused_and_left_alone(refused, discrete_run, exported):
    out, _ = exported
    before = {entry.name: entry.stat().st_mtime_ns for entry in out.iterdir()}
    assert "is not empty" in refused(discrete_run, out)
    assert {entry.name: entry.stat().st_mtime_ns for entry in out.iterdir()} == before


@pytest.fixture
def copy(discrete_run, tmp_path) -> Path:
    folder = tmp_path / "iter_0000006"
    return Path(shutil.copytree(discrete_run / "checkpoints" / "iter_0000006", folder))


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("metadata.json", "metadata.json is missing; copy"),
        ("layout.json", "no checkpoint of vqmoe"),
    ],
)
def test_an_incomplete_or_foreign_checkpoint_is_refused(lacks, says, refused, copy, tmp_path):
    (copy / lacks).unlink()
    assert says in refused(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cut_checkpoint_is_refused(refused, copy, tmp_path):
    largest = max(copy.glob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1000])
    assert largest.name in refused(copy, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"path: discrete": "path: continuous"}, "path=continuous has no discrete path"),
        ({"expert_input: code": "expert_input: blend"}, "expert_input=blend has no table"),
        (
            {
                "moe_shared_expert_intermediate_size: null": (
                    "moe_shared_expert_intermediate_size: 8"
                ),
                "add_bias_linear: true": "add_bias_linear: false",
            },
            "moe_shared_expert_intermediate_size=8 has no table",
        ),
    ],
)
def test_a_layer_without_a_table_is_refused(change, says, refused, copy, tmp_path):
    (copy / "checksums.json").unlink()  # as of a release before them
    recipe = copy / "run_config.yaml"
    for old, new in change.items():
        assert recipe.read_text().count(old) == 1
        recipe.write_text(recipe.read_text().replace(old, new))
    assert says in refused(copy, tmp_path / "out")


def test_a_filled_layer_is_no_function_of_the_code():
    with pytest.raises(ValueError, match="path=filled has no table to export: a token's output"):
        check_has_table(VQConfig(path="filled"), CodeMemoryConfig(num_rows=8))


def test_every_mixed_input_is_refused_and_both_executions_are_not():
    for expert_input in ("blend", "blend_convex", "token"):
        with pytest.raises(ValueError, match=f"expert_input={expert_input}"):
            check_has_table(VQConfig(expert_input=expert_input), CodeMemoryConfig())
    for execution in ("auto", "tokens", "code_space"):
        check_has_table(VQConfig(execution=execution), CodeMemoryConfig())


def test_one_of_several_ranks_is_refused(refused, discrete_run, tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert "runs in one process, but torchrun started 2" in refused(discrete_run, tmp_path / "out")


def test_a_quantizer_with_a_search_of_its_own_is_refused(monkeypatch):
    from vqmoe_megatron.vq.codebook import Codebook

    class Farthest(Codebook):
        def search(self, prepared):
            return super().search(-prepared)

    monkeypatch.setattr(registry, "load", lambda kind, name: Farthest)
    with pytest.raises(ValueError, match="has a search of its own"):
        check_has_table(VQConfig(), CodeMemoryConfig())
