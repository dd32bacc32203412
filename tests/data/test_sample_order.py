"""The sample order has a place: the recipe's, the corpus', or the run's, and the run says which."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from vqmoe_megatron.config import DataConfig, RunConfig, TrainConfig
from vqmoe_megatron.data.corpus import load_corpus
from vqmoe_megatron.data.datasets import build_training_dataset
from vqmoe_megatron.data.sample_order import cache_folders, check_cache_dir, order_name
from vqmoe_megatron.train.preflight import check_run


@pytest.fixture
def corpus(byte_corpus, tmp_path):
    """A corpus whose cache cannot be written, also by root: a file is in the way."""
    path = shutil.copytree(byte_corpus.path, tmp_path / "corpus")
    (path / "cache").write_text("in the way")
    return load_corpus(path)


def built_in(corpus, folders: list[Path]) -> list[Path]:
    build_training_dataset(corpus, 64, 8, 1, cache_dirs=folders)
    return [folder for folder in folders if (folder / order_name(corpus, 64, 8, 1)).is_dir()]


def test_a_corpus_that_cannot_be_written_leaves_the_runs_folder_and_says_so(
    corpus, tmp_path, capsys
):
    folders = cache_folders(corpus, None, tmp_path / "run")
    assert built_in(corpus, folders) == [tmp_path / "run" / "data_cache"]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and str(tmp_path / "run" / "data_cache") in said
    assert f"{corpus.path / 'cache'} (File exists)" in said and "data.cache_dir=DIR" in said
    assert built_in(corpus, folders) == [tmp_path / "run" / "data_cache"]
    assert capsys.readouterr().out == ""  # it is there by now
    assert (corpus.path / "cache").read_text() == "in the way"


def test_a_corpus_that_can_be_written_serves_all_runs_in_silence(byte_corpus, tmp_path, capsys):
    path = shutil.copytree(byte_corpus.path, tmp_path / "corpus")
    folders = cache_folders(load_corpus(path), None, tmp_path / "run")
    assert built_in(load_corpus(path), folders) == [path / "cache"]
    assert capsys.readouterr().out == "" and not (tmp_path / "run").exists()


def test_the_recipes_folder_is_the_only_one(byte_corpus, tmp_path):
    folders = cache_folders(byte_corpus, str(tmp_path / "a" / "b"), tmp_path / "run")
    assert folders == [tmp_path / "a" / "b"] == built_in(byte_corpus, folders)


def test_an_order_that_lies_in_the_corpus_needs_no_writing(byte_corpus, tmp_path):
    path = shutil.copytree(byte_corpus.path, tmp_path / "corpus")
    corpus = load_corpus(path)
    assert built_in(corpus, [path / "cache"])
    folders = [tmp_path / "nowhere" / "cache", path / "cache"]
    assert built_in(corpus, folders) == [path / "cache"]
    assert not (tmp_path / "nowhere").exists()


def test_no_place_at_all_names_every_one_and_the_key(corpus, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match=r"cache \(File exists\) or .*; .* or set data.cache_dir"):
        built_in(corpus, cache_folders(corpus, None, tmp_path / "run"))


@pytest.mark.parametrize("kind", ["a file", "below a file", "a dangling link"])
def test_a_cache_dir_that_cannot_be_written_is_refused_before_ranks_start(
    byte_corpus, tmp_path, kind
):
    place = tmp_path / "place"
    if kind == "a dangling link":
        place.symlink_to(tmp_path / "nowhere" / "x")
    else:
        place.write_text("mine")
    chosen = str(place / "below" if kind == "below a file" else place)
    config = RunConfig(
        data=DataConfig(path=str(byte_corpus.path), cache_dir=chosen),
        train=TrainConfig(output_dir=str(tmp_path / "run")),
    )
    with pytest.raises(ValueError, match="data.cache_dir=.*place.* cannot be written: .*choose"):
        check_run(config, 1, "cpu")
    good = replace(config, data=replace(config.data, cache_dir=str(tmp_path / "good")))
    assert check_run(good, 1, "cpu").config.data.cache_dir == str(tmp_path / "good")
    assert list((tmp_path / "good").iterdir()) == []


def test_a_full_cache_dir_that_is_closed_will_do(byte_corpus, tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    monkeypatch.setattr("tempfile.mkdtemp", None)
    check_cache_dir(str(tmp_path), "train")


def test_an_empty_cache_dir_is_refused():
    with pytest.raises(ValueError, match="data.cache_dir is empty"):
        DataConfig(cache_dir="")
