"""Trained models become VQMoEs of the same loss, and go on at other layouts: real runs and ranks.

Sources: a dense and an SMoE run of ours, and GPTModels of Megatron-core's own layers, which those
layers evaluate.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from gloo_ranks import RanksFailed
from small_run import PARITY, ROOT, TINY, run_on
from upcycle_source import save_megatrons, stored_tensors, upcycle_in_rank

pytestmark = pytest.mark.distributed

EP2 = {"expert_model_parallel_size": 2}
START = [*TINY, "train.eval_iters=4", "optimizer.lr_warmup_iters=0", "optimizer.lr=1e-2"]
START += ["optimizer.min_lr=1e-2", "vq.path=continuous", "train.train_iters=6"]
MEMORY = ["code_memory.num_rows=64", "code_memory.layers=[1]"]
DUAL = ["vq.path=dual", "vq.combine=sigmoid", "vq.norm=separate"]
FILLED = ["vq.path=filled", "vq.fill_values=direct"]
HIDDEN = ["code_memory.num_rows=64", "code_memory.codes=hidden", "code_memory.num_codes=16"]
DENSE = ["model.num_moe_experts=1", "model.moe_router_topk=1"]
# What the recipe of parity says otherwise, as many of Megatron's models have it.
LLAMA = ["model.normalization=RMSNorm", "model.gated_linear_unit=true"]
LLAMA += ["model.add_bias_linear=false", "model.activation_func=silu"]
LAST = "checkpoints/iter_0000006"
FIRST = "checkpoints/iter_0000000"


@pytest.fixture(scope="module")
def source(ranks, small_corpus, tmp_path_factory):
    """``source(*overrides)`` -> (run directory, last validation loss); trained once each."""
    known: dict[tuple, tuple] = {}

    def train(*overrides: str):
        if overrides not in known:
            out = tmp_path_factory.mktemp("source")
            records = run_on(ranks(1), small_corpus, out, [*START, *overrides], {})[0]["records"]
            known[overrides] = (out, records[-1]["val/loss"])
        return known[overrides]

    return train


@pytest.fixture
def upcycled(ranks, small_corpus):
    """``upcycled(source, out, overrides)`` -> what was measured."""

    def start(source: Path, out: Path, overrides: list[str], tolerance: float | None = None):
        every = [*START, f"data.path={small_corpus}", *overrides]
        return ranks(1).run(upcycle_in_rank, str(source), str(PARITY), every, str(out), tolerance)[
            0
        ]

    return start


@pytest.fixture
def megatrons(ranks, small_corpus, tmp_path):
    """``megatrons(num_experts, overrides)`` -> (folder it saved into, its own validation loss)."""

    def train(num_experts: int | None, overrides: list[str], **arguments):
        every = [*START, f"data.path={small_corpus}", *overrides]
        save_dir = str(tmp_path / "megatron")
        loss = ranks(1).run(save_megatrons, str(PARITY), every, save_dir, num_experts, arguments)[0]
        return Path(save_dir), loss

    return train


def stored(pool, folder: Path) -> dict:
    return pool.run(stored_tensors, str(folder))[0]


def test_an_smoe_gets_a_silent_memory_and_learns_it_at_ep2(
    source, upcycled, ranks, small_corpus, tmp_path
):
    run_dir, loss = source()
    out = tmp_path / "upcycled"
    done = upcycled(run_dir, out, MEMORY)
    assert done["source_loss"] == pytest.approx(loss, abs=1e-7)
    assert abs(done["loss"] - done["source_loss"]) <= 1e-6
    assert done["scale"] == 1.0
    old, new = stored(ranks(1), run_dir / LAST), stored(ranks(1), out / FIRST)
    experts = "mlp.experts.experts.linear_fc1.weight"
    for layer in (0, 1):  # stacked there, numbered here since one layer carries the memory
        assert new[f"decoder.layers.{layer}.{experts}"].equal(
            old[f"decoder.layers.{experts}"][layer]
        )
    rows = "decoder.layers.0.mlp.code_memory.weight"
    assert not new[rows].any()
    results = run_on(ranks(2), small_corpus, out, [*START, *MEMORY], EP2)
    records = results[0]["records"]
    assert records[0]["iteration"] == 0
    assert records[0]["val/loss"] == pytest.approx(done["loss"], rel=1e-6)
    assert records[-1]["val/loss"] < loss
    assert stored(ranks(1), out / LAST)[rows].any()
    assert json.loads((out / "status.json").read_text())["state"] == "requeue"  # run_on writes none
    record = json.loads((out / "upcycled_from.json").read_text())
    assert record["source"] == str((run_dir / LAST).resolve())
    assert record["source_iteration"] == 6
    assert record["scores"]["val/loss"] == done["loss"]


@pytest.mark.parametrize(
    ("router", "scale"),
    [
        (["model.moe_router_topk=1"], 8.0),
        (["model.moe_router_topk=2", "model.moe_router_pre_softmax=false"], 1.0),
    ],
    ids=["top1", "top2-weights-after-the-choice"],
)
def test_a_dense_mlp_becomes_every_expert(
    router, scale, source, upcycled, ranks, small_corpus, tmp_path
):
    run_dir, loss = source(*DENSE)
    out = tmp_path / "upcycled"
    done = upcycled(run_dir, out, [*MEMORY, *router])
    assert done["source_loss"] == pytest.approx(loss, abs=1e-7)
    assert abs(done["loss"] - loss) <= 1e-6
    assert (done["scale"], done["dense_layers"]) == (scale, 2)
    old, new = stored(ranks(1), run_dir / LAST), stored(ranks(1), out / FIRST)
    for number, factor in ((1, 1.0), (2, scale)):
        for kind in ("weight", "bias"):
            name = f"mlp.experts.experts.linear_fc{number}.{kind}"
            one = old[f"decoder.layers.{name}"][1] * factor
            assert new[f"decoder.layers.1.{name}"].equal(one.expand(8, *one.shape[1:]))
    records = run_on(ranks(2), small_corpus, out, [*START, *MEMORY, *router], EP2)[0]["records"]
    assert records[0]["val/loss"] == pytest.approx(done["loss"], rel=1e-6)
    # Of 8 experts the busiest would have 8 times its share if all tokens went to one.
    assert records[1]["moe/expert_load_imbalance"] < 5.0


@pytest.mark.parametrize(
    ("recipe", "codebook", "silent"),
    [
        (DUAL, "mlp.assigner", "mlp.output_norm.weight"),
        (FILLED, "mlp.assigner", "mlp.fill_rows.values"),
        (HIDDEN, "mlp.memory_assigner", "mlp.code_memory.weight"),
    ],
    ids=["dual", "filled", "memory-of-hidden-states"],
)
def test_codes_are_of_real_activations_and_silent(
    recipe, codebook, silent, source, upcycled, ranks, small_corpus, tmp_path
):
    run_dir, loss = source()
    out = tmp_path / "upcycled"
    done = upcycled(run_dir, out, recipe)
    assert abs(done["loss"] - loss) <= 1e-6
    # 64 tokens for each of 16 codes would be 64 sequences of 16 tokens; the run reads 24.
    assert set(done["sampled"].values()) == {24 * 16}
    new = stored(ranks(1), out / FIRST)
    (codes,) = [new[name] for name in new if name.endswith(f"{codebook}.codebook.codes")]
    (initialized,) = [new[n] for n in new if n.endswith(f"{codebook}.codebook.initialized")]
    assert initialized.all()
    assert codes.flatten(0, -2).unique(dim=0).shape == codes.flatten(0, -2).shape
    assert not [new[name] for name in new if name.endswith(silent)][0].any()
    records = run_on(ranks(2), small_corpus, out, [*START, *recipe], EP2)[0]["records"]
    assert records[0]["val/loss"] == pytest.approx(done["loss"], rel=1e-6)
    assert records[-1]["val/loss"] < loss
    new = stored(ranks(1), out / LAST)
    assert [new[name] for name in new if name.endswith(silent)][0].any()


@pytest.mark.parametrize(
    ("num_experts", "model", "target", "scale"),
    [
        (None, ["model.moe_router_topk=1"], MEMORY, 8.0),
        (None, LLAMA, [*MEMORY, "model.untie_embeddings_and_output_weights=false"], 4.0),
        # With biases Megatron's experts cannot be trained on a CPU: mlp.py adds to a view in place.
        (8, ["model.add_bias_linear=false"], [*MEMORY, *DUAL], 1.0),
        (8, [*LLAMA, "model.moe_router_topk=1"], MEMORY, 1.0),
    ],
    ids=["dense", "dense-llama", "experts", "experts-llama"],
)
def test_a_model_of_megatrons_own_layers(
    num_experts, model, target, scale, megatrons, upcycled, ranks, small_corpus, tmp_path
):
    model = [*model, *(part for part in target if part.startswith("model."))]
    folder, loss = megatrons(num_experts, model)
    out = tmp_path / "upcycled"
    done = upcycled(folder, out, [*model, *target])
    assert done["source_loss"] == pytest.approx(loss, abs=1e-6)  # of the model that was saved
    assert abs(done["loss"] - done["source_loss"]) <= 1e-6
    assert done["scale"] == scale
    assert "does not hold Megatron-LM's args" in done["notes"][0]
    records = run_on(ranks(2), small_corpus, out, [*START, *model, *target], EP2)[0]["records"]
    assert records[0]["val/loss"] == pytest.approx(done["loss"], rel=1e-6)


def test_dense_layers_between_and_half_precision(source, upcycled, tmp_path):
    run_dir, loss = source(*DENSE, "model.bf16=true")
    between = ["model.moe_layer_freq=2", "model.ffn_hidden_size=64", "model.bf16=true"]
    done = upcycled(run_dir, tmp_path / "upcycled", [*MEMORY, *between])
    assert done["source_loss"] == pytest.approx(loss, abs=1e-7)
    assert (done["scale"], done["dense_layers"]) == (4.0, 1)
    assert abs(done["loss"] - loss) <= 2e-3


def test_megatron_lms_arguments_are_compared(megatrons, upcycled, tmp_path):
    known = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "swiglu": False}
    folder, _ = megatrons(None, [], **known, qk_layernorm=True)
    with pytest.raises(RanksFailed) as refused:
        upcycled(folder, tmp_path / "upcycled", MEMORY)
    assert "recipe 4, the source's args num_attention_heads=2" in str(refused.value)
    assert "qk_layernorm=True" in str(refused.value)
    assert "hidden_size=" not in str(refused.value)


def test_another_function_is_not_written(source, upcycled, tmp_path):
    run_dir, _ = source()
    out = tmp_path / "upcycled"
    with pytest.raises(RanksFailed, match="not written: the loss of the source is"):
        upcycled(run_dir, out, MEMORY, tolerance=-1.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["model.hidden_size=64"], "model.hidden_size: source 32, recipe 64"),
        (["model.num_moe_experts=16"], "other numbers of experts are what checkpoint.remap"),
        (["model.moe_router_topk=1"], "model.moe_router_topk: source 2, recipe 1"),
        (["model.vocab_size=300", "model.make_vocab_size_divisible_by=100"], "divisible_by"),
        (["model.vocab_size=600"], "another vocabulary, or one that Megatron padded otherwise"),
        (["data.path=/nowhere"], "/nowhere"),
        (["vq.path=dual"], "use combine=sigmoid and norm=separate"),
    ],
    ids=["hidden", "experts", "topk", "padding", "vocabulary", "corpus", "dual"],
)
def test_what_does_not_fit_is_refused(changed, said, source, upcycled, tmp_path):
    run_dir, _ = source()
    with pytest.raises(RanksFailed) as refused:
        upcycled(run_dir, tmp_path / "upcycled", [*MEMORY, *changed])
    assert said in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_megatrons_other_sizes_are_refused_by_tensor(megatrons, upcycled, tmp_path):
    folder, _ = megatrons(None, [])
    with pytest.raises(RanksFailed) as refused:
        upcycled(folder, tmp_path / "upcycled", [*MEMORY, "model.hidden_size=64"])
    assert "embedding.word_embeddings.weight: source [256, 32], this recipe [256, 64]" in str(
        refused.value
    )


def test_the_command_and_what_it_tells(source, small_corpus, tmp_path):
    run_dir, loss = source()
    out = tmp_path / "a run"
    settings = [*START, *MEMORY, f"data.path={small_corpus}", "tracking.mlflow=false"]

    def vqmoe(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "vqmoe_megatron.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    command = ["upcycle", str(run_dir), str(PARITY), *settings, "--out", str(out)]
    done = vqmoe(*command)
    assert done.returncode == 0, done.stderr
    table = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in table[2:6]] == ["model", "source", "upcycled", "difference"]
    assert all(math.isclose(float(row[1]), loss, abs_tol=1e-6) for row in table[3:5])
    assert f"train it: vqmoe pretrain '{out}/run_config.yaml' --nproc 1" in done.stdout
    trained = vqmoe("pretrain", f"{out}/run_config.yaml", "--nproc", "1")
    assert trained.returncode == 0, trained.stderr
    assert (out / LAST / "metadata.json").is_file()
    again = vqmoe(*command)
    assert again.returncode == 2
    assert "is not empty; choose another directory" in again.stderr
