"""A file that is not as it was written is one sentence for every command; without sums it loads."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from small_run import PARITY, TINY, run_on
from troubled_run import finish_again_without_data, refusal_of_resuming
from typer.testing import CliRunner

from vqmoe_megatron.checkpoint.checksums import (
    check_all_files,
    check_small_files,
    checksum,
    read_checksums,
    write_checksums,
)
from vqmoe_megatron.checkpoint.inspection import inspect_checkpoint
from vqmoe_megatron.checkpoint.saver import TRACKER_FILE
from vqmoe_megatron.checkpoint.table_export import export_tables
from vqmoe_megatron.cli.checkpoint import checkpoint_app

pytestmark = pytest.mark.distributed

EP2 = {"expert_model_parallel_size": 2}
STEPS = [*TINY, "train.train_iters=2", "optimizer.lr_warmup_iters=0", "checkpoint.save_interval=1"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """What looks like a checkpoint: two data files and a small one, summed."""
    folder = tmp_path / "iter_0000002"
    folder.mkdir()
    for name in ("__0_0.distcp", "__1_0.distcp", "layout.json"):
        (folder / name).write_bytes(name.encode() * 1000)
    write_checksums(folder, {"__1_0.distcp": checksum(folder / "__1_0.distcp")})
    return folder


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_every_file_is_summed_and_found_again(folder):
    assert set(read_checksums(folder)) == {"__0_0.distcp", "__1_0.distcp", "layout.json"}
    assert check_all_files(folder) == 3
    assert checksum(folder / "layout.json")[0] == 1000 * len("layout.json")


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", "layout.json"])
def test_one_bit_is_noticed_and_the_ways_on_are_named(name, folder):
    flip(folder / name)
    with pytest.raises(ValueError, match=rf"/{name} is not as it was written.*; copy {name} again"):
        check_all_files(folder)
    before = folder.with_name("iter_0000001")
    before.mkdir()
    (before / "metadata.json").write_text("{}")
    with pytest.raises(ValueError, match=f"or use {before} instead, .* when 1 is written into"):
        check_all_files(folder)
    if name.endswith(".distcp"):
        check_small_files(folder)
    else:
        with pytest.raises(ValueError, match=name):
            check_small_files(folder)


def test_other_lengths_missing_files_and_many_are_told_apart(folder):
    (folder / "__0_0.distcp").write_bytes(b"short")
    with pytest.raises(ValueError, match="__0_0.distcp has 5 bytes instead of 12,000; "):
        check_all_files(folder)
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(ValueError, match=r"__0_0.distcp .* \(1 more files are damaged\)"):
        check_all_files(folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("{", "cannot be read"),
        ("{}", "holds no checksums"),
        ('{"algorithm": "md5", "files": {}}', "the algorithm is 'md5'"),
        ('{"algorithm": "crc32", "files": {"a": 1}}', "holds no checksums"),
    ],
)
def test_damaged_checksums_are_no_missing_ones(content, says, folder):
    (folder / "checksums.json").write_text(content)
    with pytest.raises(ValueError, match=f"damaged checkpoint: .*checksums.json .*{says}"):
        check_all_files(folder)
    (folder / "checksums.json").unlink()
    assert read_checksums(folder) is check_all_files(folder) is None


@pytest.fixture(scope="module")
def trained(ranks, small_corpus, tmp_path_factory) -> Path:
    """A run of two ranks, whose checkpoint of iteration 1 was written in the background."""
    out = tmp_path_factory.mktemp("summed")
    run_on(ranks(2), small_corpus, out, [*STEPS, "checkpoint.async_save=true"], EP2)
    return out


@pytest.fixture
def run_dir(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def again(run_dir: Path, corpus: Path) -> list[str]:
    return [*STEPS, f"data.path={corpus}", f"train.output_dir={run_dir}"]


@pytest.mark.parametrize("name", ["iter_0000001", "iter_0000002"])
def test_both_ways_of_saving_sum_the_files_of_all_ranks(name, trained):
    folder = trained / "checkpoints" / name
    files = {file.name for file in folder.iterdir()} - {"checksums.json"}
    assert set(json.loads((folder / "checksums.json").read_text())["files"]) == files
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "common.pt", "metadata.json"} <= files
    assert inspect_checkpoint(folder).num_verified_files == len(files)


def test_damage_of_the_same_size_is_one_sentence_for_inspect_export_and_resume(
    ranks, run_dir, small_corpus
):
    file = run_dir / "checkpoints" / "iter_0000002" / "__1_0.distcp"
    flip(file)
    with pytest.raises(ValueError, match="is not as it was written") as inspected:
        inspect_checkpoint(run_dir)
    with pytest.raises(ValueError, match=re.escape(str(inspected.value))):
        export_tables(run_dir, run_dir / "tables")
    said = str(inspected.value)
    assert re.search(rf"{file} .*; copy .* or use .*iter_0000001 instead", said)
    (resumed,) = ranks(1).run(refusal_of_resuming, str(PARITY), again(run_dir, small_corpus))
    assert resumed == said
    # The way that it names: the checkpoint before.
    (run_dir / "checkpoints" / TRACKER_FILE).write_text("1\n")
    (result,) = run_on(ranks(1), small_corpus, run_dir, STEPS, {})
    assert [record["iteration"] for record in result["records"]] == [2]
    assert inspect_checkpoint(run_dir).num_verified_files is not None


def test_ranks_that_see_only_a_share_refuse_alike(ranks, run_dir, small_corpus):
    flip(run_dir / "checkpoints" / "iter_0000002" / "__1_0.distcp")
    every = [*again(run_dir, small_corpus), "parallel.expert_model_parallel_size=2"]
    first, second = ranks(2).run(refusal_of_resuming, str(PARITY), every, layout=EP2)
    assert first == second and "__1_0.distcp is not as it was written" in first


def test_a_checkpoint_of_before_loads_and_says_that_it_has_none(ranks, run_dir, small_corpus):
    folder = run_dir / "checkpoints" / "iter_0000002"
    (folder / "checksums.json").unlink()
    (said,) = ranks(1).run(refusal_of_resuming, str(PARITY), again(run_dir, small_corpus))
    assert said == "it was loaded"
    shown = CliRunner().invoke(checkpoint_app, ["inspect", str(folder)]).output
    assert re.search("checksums +no checksums, written before 0.5", shown)


def test_a_completed_run_opens_no_data_again(ranks, run_dir, small_corpus):
    (result,) = ranks(1).run(finish_again_without_data, str(PARITY), again(run_dir, small_corpus))
    assert (result["state"], result["iteration"]) == ("completed", 2)
