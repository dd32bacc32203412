"""Small real runs are measured: what is planted in them is seen, and the page says all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from analysis_job import analysed, loss_of, moved_by_a_codebooks_step, planted, read_twice
from small_run import TINY, run_on

from vqmoe_megatron.analysis.analyze import check_request, from_here
from vqmoe_megatron.analysis.settings import Settings
from vqmoe_megatron.data.prepare import prepare_corpus

pytestmark = pytest.mark.distributed

START = [*TINY, "train.eval_iters=4", "train.train_iters=6", "optimizer.lr_warmup_iters=0"]
START += ["optimizer.lr=1e-2", "optimizer.min_lr=1e-2", "model.moe_router_topk=1"]
START += ["checkpoint.save_interval=3", "checkpoint.keep_last=2"]
RUNS = {
    "dual": ["vq.path=dual", "vq.codebook_update=ema"],
    "smoe": ["vq.path=continuous"],
    "filled": ["vq.path=filled", "vq.threshold_routing=true"],
    "memory": ["vq.path=continuous", "code_memory.num_rows=64", "code_memory.layers=[1]"],
    "dense": ["vq.path=continuous", "model.num_moe_experts=1"],
    "biased": [
        "vq.path=dual",
        "vq.codebook_update=ema",
        "model.moe_router=loss_free",
        "model.moe_router_load_balancing_type=none",
    ],
    "streams": [
        "model.attention=transformer_xl",
        "model.position_embedding_type=relative",
        "model.memory_length_tokens=24",
    ],
}


@pytest.fixture(scope="module")
def run(ranks, small_corpus, tmp_path_factory):
    """``run(name, layout)`` -> (run directory, its last validation loss); trained once each."""
    known: dict[tuple, tuple[Path, float]] = {}
    folder = tmp_path_factory.mktemp("runs")

    def train(name: str, world_size: int = 1, **layout: int) -> tuple[Path, float]:
        key = (name, world_size, *layout.items())
        if key not in known:
            out = folder / f"{name}{world_size}"
            done = run_on(ranks(world_size), small_corpus, out, [*START, *RUNS[name]], layout)
            known[key] = out, done[0]["records"][-1]["val/loss"]
        return known[key]

    return train


@pytest.fixture(scope="module")
def domain(tmp_path_factory) -> Path:
    """Text of another kind, in bytes."""
    folder = tmp_path_factory.mktemp("domain")
    for name, step in (("a", 7), ("b", 11)):
        numbers = " ".join(str(number * step % 1000) for number in range(6000))
        (folder / f"{name}.txt").write_text(numbers)
    files = [folder / "a.txt", folder / "b.txt"]
    prepare_corpus("text", folder / "corpus", files, "byte", None, False, False)
    return folder / "corpus"


@pytest.mark.parametrize(
    ("name", "world_size", "layout"),
    [
        ("dual", 1, {}),
        ("dual", 2, {"expert_model_parallel_size": 2}),
        pytest.param(*("memory", 2, {"pipeline_model_parallel_size": 2}), marks=pytest.mark.full),
    ],
    ids=["one-rank", "ep2", "pp2-memory"],
)
def test_the_loss_is_the_run_s_whatever_layout_wrote_it(
    name, world_size, layout, run, ranks, small_corpus
) -> None:
    run_dir, loss = run(name, world_size, **layout)
    found = ranks(1).run(loss_of, str(run_dir), str(small_corpus), 4 * 4 * 16)[0]
    assert found == pytest.approx(loss, rel=2e-6)


def test_a_page_names_a_checkpoint_as_seen_from_here(tmp_path, monkeypatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path / "runs")
    assert from_here(tmp_path / "runs" / "one") == "one"
    assert from_here(tmp_path / "other") == str(tmp_path / "other")


def test_no_window_is_remembered_by_the_next(run, ranks, small_corpus) -> None:
    kind, first, second = ranks(1).run(read_twice, str(run("streams")[0]), str(small_corpus))[0]
    assert first == second
    assert kind.endswith("each window read without the text before")


def test_a_step_of_codebooks_alone_moves_no_router(run, ranks, small_corpus) -> None:
    names = ranks(1).run(moved_by_a_codebooks_step, str(run("biased")[0]), str(small_corpus))[0]
    assert any(name.endswith("codebook.codes") for name in names)
    assert not [name for name in names if ".router." in name]


def test_copies_of_one_expert_and_a_permuted_codebook_are_seen(run, ranks, small_corpus) -> None:
    found = ranks(1).run(planted, str(run("dual")[0]), str(small_corpus))[0]
    for before, after in zip(found["collapse"], found["copies"], strict=True):
        assert before["different_experts"] > 2.0
        assert after["different_experts"] == pytest.approx(1.0, abs=1e-3)
        assert after["output_cosine"] == pytest.approx(1.0, abs=1e-5)
        assert after["weight_cosine"] == pytest.approx(1.0, abs=1e-5)
        assert before["claim"] == 8 + before["num_codes"] + 2
    of_codes = [row for row in found["permuted"] if row["kind"] == "codes"]
    codes = [row for row in of_codes if row["compared"] == "earlier checkpoint"]
    assert len(codes) == 2
    for row in codes:
        assert row["renamed"] > 0.999 > 0.5 > row["same"]
        assert row["renamed"] >= row["renamed_by_chance"]  # few codes are in use
    points = found["adaptation"]["points"]
    assert [number for number, _ in points] == sorted({number for number, _ in points})
    assert points[-1][1] < points[0][1]
    moving = [row for row in found["drift"]["rows"] if row["codebooks"] == "moving"]
    assert moving[0]["changed"] == 0.0 < moving[-1]["changed"]
    assert found["is_back"]


def test_a_router_s_gradients_have_no_more_directions_than_experts(
    run, ranks, small_corpus
) -> None:
    found = ranks(1).run(planted, str(run("smoe")[0]), str(small_corpus))[0]
    for row in found["collapse"]:
        assert 0 < row["routing_rank"] <= row["claim"] == 8
        assert row["gradient_rank"] > row["routing_rank"]


def test_the_page_has_every_model_and_every_part(
    run, ranks, small_corpus, domain, tmp_path
) -> None:
    paths = [str(run(name)[0]) for name in RUNS]
    out = tmp_path / "page"
    arguments = (paths, str(out), str(small_corpus), str(domain), None)
    content, said = ranks(1).run(analysed, *arguments)[0]
    assert any("dual1 6: meaning" in line for line in said)
    written = json.loads((out / "analysis.json").read_text())
    assert written["models"] == content["models"]
    names = [f"{name}1 6" for name in RUNS]
    assert list(written["models"]) == names
    parts = written["parts"]
    assert all(list(found) == names for found in parts.values())
    assert "dense" in parts["load"]["dense1 6"]["reason"]
    assert "no codebook" in parts["drift"]["smoe1 6"]["reason"]
    assert parts["routing"]["dual1 6"]["earlier"] == [3]
    filled = parts["routing"]["filled1 6"]
    assert "layer 1 experts" in filled["skipped"]
    assert {row["kind"] for row in filled["rows"]} == {"codes"}
    page = (out / "index.html").read_text()
    assert page.count("<img ") == 7
    assert "28%" in page
    for title in ("Load and code usage", "Routing", "collapse", "Robustness", "What codes mean"):
        assert title in page
    assert "Part of speech: not computed" in page

    replaced = ranks(1).run(analysed, paths[:1], *arguments[1:3], None, ["load"])[0]
    assert list(replaced[0]["parts"]) == ["load"]
    assert not (out / "drift.png").exists()
    (out / "report.md").write_text("mine")
    with pytest.raises(ValueError, match="vqmoe analyze did not write it"):
        check_request([Path(paths[0])], out, Settings(), data=small_corpus)
    assert (out / "report.md").read_text() == "mine"


def test_what_cannot_be_analysed_is_refused_first(run, small_corpus, tmp_path) -> None:
    run_dir, out = run("smoe")[0], tmp_path / "page"
    refused = [
        ({"parts": ["drift"]}, "needs --domain PATH"),
        ({"parts": ["speed"]}, "the parts are load, routing"),
        ({"data": tmp_path}, "was never prepared"),
        ({"domain": tmp_path / "nothing"}, "no corpus directory"),
    ]
    for changes, message in refused:
        with pytest.raises(ValueError, match=message):
            check_request([run_dir], out, Settings(), **({"data": small_corpus} | changes))
    (tags := tmp_path / "tags").write_text("NOUN\n")
    with pytest.raises(ValueError, match="has 1 lines"):
        check_request([run_dir], out, Settings(tags=tags), data=small_corpus)
    with pytest.raises(ValueError, match="is no directory"):
        check_request([run_dir], tags, Settings(), data=small_corpus)
    with pytest.raises(ValueError, match="has no split 'nothing'"):
        check_request([run_dir], out, Settings(split="nothing"), data=small_corpus)
    with pytest.raises(ValueError, match="does not exist"):
        check_request([tmp_path / "run"], out, Settings(), data=small_corpus)
    assert not out.exists()
