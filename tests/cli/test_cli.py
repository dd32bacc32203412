"""Refused input: one short message and exit code 2, before any rank starts; help with examples."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from vqmoe_megatron import cli
from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.recipe import load_recipe, save_recipe
from vqmoe_megatron.launch import local_ranks
from vqmoe_megatron.launch.local_ranks import RanksEnded
from vqmoe_megatron.rundir.run_directory import RunDirectory
from vqmoe_megatron.rundir.status import read_status, write_status

ROOT = Path(__file__).resolve().parents[2]
PARITY = str(ROOT / "recipes" / "parity.yaml")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    from vqmoe_megatron.data.prepare import prepare_corpus

    out = tmp_path_factory.mktemp("cli") / "corpus"
    text = Path(sysconfig.get_path("stdlib")) / "argparse.py"
    prepare_corpus("text", out, [text], "byte", None, False, False)
    return out


@pytest.fixture
def vqmoe(monkeypatch, capsys):
    """Run the command in this process; starting a rank fails the test."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)

    def started(*_):
        raise AssertionError("a rank was started")

    monkeypatch.setattr(local_ranks, "run_local_ranks", started)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vqmoe", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return ended.value.code, shown.out + shown.err

    return run


def pretrain(corpus, tmp_path, *overrides: str) -> list[str]:
    where = [f"data.path={corpus}", f"train.output_dir={tmp_path / 'run'}"]
    return ["pretrain", PARITY, "--nproc", "2", *where, *overrides]


REFUSALS = {
    "unknown key": (["vq.num_code=8"], ["vq.num_codes", "did you mean"]),
    "unknown section": (["vqq.num_codes=8"], ["unknown section", "vq"]),
    "wrong type": (["train.train_iters=many"], ["train.train_iters", "int", "many"]),
    "experts over ranks": (
        ["model.num_moe_experts=7", "parallel.expert_model_parallel_size=2"],
        ["num_moe_experts % EP != 0: 7 % 2 = 1"],
    ),
    "world size": (
        ["parallel.tensor_model_parallel_size=4"],
        ["world_size % (TP * PP * CP = 4 * 1 * 1) != 0: 2 % 4 = 2"],
    ),
    "batch": (["train.global_batch_size=15"], ["15 % 2 = 1"]),
    "code space with blend": (
        ["vq.execution=code_space", "vq.expert_input=blend"],
        ["code_space", "expert_input=blend", "own expert input"],
    ),
    "table without code space": (
        ["vq.table_per_step=true", "vq.execution=tokens"],
        ["vq.table_per_step=true", "vq.execution=tokens"],
    ),
    "table with overlap": (
        ["vq.table_per_step=true", "optimizer.overlap_grad_reduce=true"],
        ["vq.table_per_step", "optimizer.overlap_grad_reduce"],
    ),
    "balanced map": (
        ["vq.code_map=balanced", "vq.num_codes=17"],
        ["code_map=balanced", "17 % 8 = 1"],
    ),
    "missing corpus": (["data.path=nowhere/at/all"], ["nowhere/at/all", "vqmoe prepare"]),
    "vocabulary": (["model.vocab_size=100"], ["model.vocab_size=100", "256", "byte"]),
    "missing load": (["checkpoint.load=not/there"], ["checkpoint.load=not/there"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_one_screen_and_exit_code_2(name, vqmoe, corpus, tmp_path):
    overrides, says = REFUSALS[name]
    code, shown = vqmoe(*pretrain(corpus, tmp_path, *overrides))
    assert code == 2, shown
    for text in says:
        assert text in shown
    assert "Traceback" not in shown and len(shown.splitlines()) < 25
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_cut_corpus_is_refused(vqmoe, corpus, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(corpus, cut)
    with (cut / "train.bin").open("r+b") as file:
        file.truncate(1000)
    code, shown = vqmoe(*pretrain(cut, tmp_path))
    assert code == 2
    assert "train.bin has 1000 bytes" in shown and "truncated" in shown


@pytest.mark.parametrize("below", ["", "inside"])
def test_a_file_in_the_way_of_the_run_directory_is_refused(below, vqmoe, corpus, tmp_path):
    (tmp_path / "file").touch()
    where = f"train.output_dir={tmp_path / 'file' / below}"
    code, shown = vqmoe(*pretrain(corpus, tmp_path, where))
    assert code == 2 and "cannot be written" in shown and "Traceback" not in shown


@pytest.fixture
def checkpointed(tmp_path, corpus) -> Path:
    """A run directory with what the preflight reads of a checkpoint: one without any tensor."""
    import torch
    from torch.distributed.checkpoint.metadata import Metadata

    from vqmoe_megatron.checkpoint.content import BACKENDS, FORMAT_VERSION

    folder = tmp_path / "run" / "checkpoints" / "iter_0000010"
    folder.mkdir(parents=True)
    recipe = load_recipe(Path(PARITY), ["model.vocab_size=256"])
    save_recipe(recipe, folder / "run_config.yaml")
    sizes = {"world_size": 2, "virtual_pipeline_model_parallel_size": None}
    sizes |= {f"{name}_model_parallel_size": 1 for name in ("tensor", "pipeline", "expert")}
    sizes |= {"context_parallel_size": 1, "expert_tensor_parallel_size": 1}
    (folder / "layout.json").write_text(json.dumps(sizes | {"sequence_parallel": False}))
    shutil.copyfile(corpus / "corpus.json", folder / "corpus.json")
    backends = {name: known[0] for name, known in BACKENDS.items()}
    (folder / "metadata.json").write_text(json.dumps(backends))
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data={})))
    torch.save({"format_version": FORMAT_VERSION}, folder / "common.pt")
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("10\n")
    return folder


def test_a_checkpoint_of_another_model_is_refused(vqmoe, corpus, tmp_path, checkpointed):
    overrides = ["vq.num_codes=32", "parallel.expert_model_parallel_size=2"]
    code, shown = vqmoe(*pretrain(corpus, tmp_path, *overrides))
    assert code == 2 and len(shown.splitlines()) < 25
    assert "vq.num_codes: checkpoint 16, recipe 32" in shown
    assert "checkpoint.remap=true" in shown
    assert "expert_model_parallel_size" not in shown  # another layout is no reason


def test_a_checkpoint_of_another_tokenizer_is_refused(vqmoe, corpus, tmp_path, checkpointed):
    description = json.loads((checkpointed / "corpus.json").read_text())
    description["tokenizer"] |= {"kind": "char", "sha256": "0" * 64}
    (checkpointed / "corpus.json").write_text(json.dumps(description))
    code, shown = vqmoe(*pretrain(corpus, tmp_path))
    assert code == 2 and "checkpoint 'char', corpus 'byte'" in shown


def test_a_damaged_tracker_is_refused(vqmoe, corpus, tmp_path, checkpointed):
    (checkpointed.parent / "latest_checkpointed_iteration.txt").write_bytes(b"\x00\x00")
    code, shown = vqmoe(*pretrain(corpus, tmp_path))
    assert code == 2 and "iter_0000010" in shown and "Traceback" not in shown


def test_what_fits_the_checkpoint_is_not_refused(vqmoe, corpus, tmp_path, checkpointed):
    with pytest.raises(AssertionError, match="a rank was started"):
        vqmoe(*pretrain(corpus, tmp_path))


@pytest.mark.parametrize(
    "refused",
    [["train.train_iters=9", "optimizer.lr_decay_iters=20"], ["train.seed=99"], ["vq.num_code=8"]],
)
def test_a_refusal_leaves_a_completed_run_as_it_is(refused, vqmoe, corpus, tmp_path, checkpointed):
    run_dir = tmp_path / "run"
    shutil.copyfile(checkpointed / "run_config.yaml", run_dir / "run_config.yaml")
    write_status(run_dir, "completed", 10, "all iterations done")
    before = {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}
    code, shown = vqmoe(*pretrain(corpus, tmp_path, *refused))
    assert code == 2 and "Traceback" not in shown
    assert {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()} == before


def test_ranks_that_refuse_leave_a_completed_run_as_it_is(
    vqmoe, corpus, tmp_path, checkpointed, monkeypatch
):
    write_status(tmp_path / "run", "completed", 10, "all iterations done")
    before = (tmp_path / "run" / "status.json").read_bytes()
    ends = [local_ranks.RanksEnded(2, "rank 0 ended with exit code 2")]
    ends += [local_ranks.RanksEnded(1, "rank 1 ended with exit code 1")]
    for ended in ends:
        monkeypatch.setattr(local_ranks, "run_local_ranks", lambda *_, ended=ended: ended)
        assert (tmp_path / "run" / "status.json").read_bytes() == before
        assert vqmoe(*pretrain(corpus, tmp_path))[0] == ended.code
    status = read_status(tmp_path / "run")
    assert (status.state, status.reason) == ("failed", "rank 1 ended with exit code 1")


def test_the_last_line_is_the_first_cause_and_not_what_a_peer_said(
    vqmoe, corpus, tmp_path, monkeypatch
):
    run_dir = RunDirectory(tmp_path / "run")

    def killed(*_):
        run_dir.record_end(0, ConnectionError("Connection closed by peer"))
        print("Traceback of rank 0")
        return local_ranks.RanksEnded(137, "rank 1 was killed by SIGKILL", was_killed=True)

    monkeypatch.setattr(local_ranks, "run_local_ranks", killed)
    code, shown = vqmoe(*pretrain(corpus, tmp_path))
    assert code == 137
    assert shown.splitlines()[-1] == "error: the run failed: rank 1 was killed by SIGKILL"


@pytest.mark.parametrize(
    "arguments",
    [["pretrian"], ["pretrain"], ["pretrain", "x.yaml", "--nproc", "0"], ["prepare", "--nope"]],
)
def test_usage_errors_are_exit_code_2(arguments, vqmoe):
    code, shown = vqmoe(*arguments)
    assert code == 2 and "Traceback" not in shown


def command_lines(command, words=()):
    """The words of every shown command below `command`, groups walked through."""
    for name, below in getattr(command, "commands", {}).items():
        yield from command_lines(below, (*words, name))
    if not hasattr(command, "commands") and not command.hidden:
        yield words


def test_every_command_shows_an_example():
    lines = list(command_lines(get_command(cli.app)))
    assert {("prepare",), ("pretrain",), ("preflight",), ("study", "submit")} <= set(lines)
    for words in lines:
        shown = CliRunner().invoke(cli.app, [*words, "--help"])
        assert shown.exit_code == 0
        assert re.search(rf"Example: .*vqmoe {' '.join(words)}", shown.output), words


INTERRUPTED_IMPORT = """
import os, runpy, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
runpy.run_module("vqmoe_megatron.cli", run_name="__main__")
"""


# The command's own imports, those of its work, and one that typer makes outside of the command.
@pytest.mark.parametrize("module", ["typer", "vqmoe_megatron.runtime.doctor", "typer.rich_utils"])
def test_an_interrupt_of_any_import_is_one_line_and_exit_code_130(module):
    arguments = ["--help"] if module == "typer.rich_utils" else ["doctor"]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "INTERRUPT_AT": module},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_prepare_shows_each_splits_size_once(vqmoe, tmp_path):
    text = Path(sysconfig.get_path("stdlib")) / "argparse.py"
    where = ["--input", str(text), "--out", str(tmp_path / "corpus")]
    code, shown = vqmoe("prepare", "text", *where)
    corpus = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
    assert code == 0
    for split in corpus["splits"].values():
        assert shown.replace(",", "").count(f"{split['num_tokens']} tokens") == 1
    assert "tokens:" not in shown


def test_a_password_in_the_tracking_uri_is_not_shown(vqmoe, corpus, tmp_path):
    uri = "tracking.mlflow_uri=http://user:s3cret@host"
    code, shown = vqmoe(*pretrain(corpus, tmp_path, uri))
    assert code == 2 and "MLFLOW_TRACKING_PASSWORD" in shown and "s3cret" not in shown


def real_command(*arguments: str, **options) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "vqmoe_megatron.cli", *arguments],
        cwd=ROOT,
        env=kept | options.pop("variables", {}),
        **options,
    )


def test_output_that_is_the_result_must_not_get_lost():
    with open("/dev/full", "w") as full:
        done = real_command("--version", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"error: the output could not be written: No space left on device\n"
    reader, nobody_reads = os.pipe()
    os.close(reader)
    done = real_command("--version", stdout=nobody_reads, stderr=subprocess.PIPE)
    os.close(nobody_reads)
    assert (done.returncode, done.stderr) == (0, b"")  # as in: vqmoe ... | head


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_name_that_the_output_cannot_hold_ends_no_command(encoding, tmp_path):
    (tmp_path / "text").write_text("some text\n" * 500)
    out = tmp_path / "o_日本"
    arguments = ["prepare", "text", "--input", str(tmp_path / "text"), "--out", str(out)]
    done = real_command(*arguments, variables={"PYTHONIOENCODING": encoding}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (out / "corpus.json").exists()
    done = real_command(*arguments, "--tokenizer", "char", variables={"PYTHONIOENCODING": encoding})
    assert done.returncode == 2


def test_the_real_command_refuses_alike(tmp_path):
    done = real_command("pretrain", "no/such.yaml", capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: recipe no/such.yaml does not exist")
    assert "parity.yaml" in done.stderr


def test_ranks_read_what_a_pipe_held(vqmoe, corpus, tmp_path, monkeypatch) -> None:
    read: list[RunConfig] = []

    def ranks(arguments: list[str], _num_ranks: int) -> RanksEnded:
        for _ in range(2):  # every rank by itself
            read.append(load_recipe(Path(arguments[1]), arguments[2:]))
        return RanksEnded(0)

    monkeypatch.setattr(local_ranks, "run_local_ranks", ranks)
    given = pretrain(corpus, tmp_path, "train.seed=7")
    text = Path(PARITY).read_text()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(text))
    writer.start()
    code, _ = vqmoe(*(str(pipe) if argument == PARITY else argument for argument in given))
    writer.join()
    assert code == 0
    assert read == [load_recipe(Path(PARITY), given[given.index(PARITY) + 3 :])] * 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "2"),
        ("RANK", "x"),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "1000000000000"),
        ("LOCAL_RANK", ""),
        ("MASTER_ADDR", " "),
        ("MASTER_PORT", "70000"),
    ],
)
def test_a_launchers_nonsense_is_refused_before_the_first_write(
    vqmoe, corpus, tmp_path, monkeypatch, name, value
) -> None:
    world = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    meeting_place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for variable, text in {**world, **meeting_place, name: value}.items():
        monkeypatch.setenv(variable, text)
    given = [text for text in pretrain(corpus, tmp_path) if text not in ("--nproc", "2")]
    code, shown = vqmoe(*given)
    assert code == 2 and name.lower() in shown.lower() and "Traceback" not in shown
    assert not (tmp_path / "run").exists()


def test_the_command_line_starts_without_torch_and_hides_no_gpu() -> None:
    code = (
        "import os, sys; before = dict(os.environ); import vqmoe_megatron.cli; "
        "sys.exit('torch' in sys.modules or before != dict(os.environ))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0
