"""A model with other numbers of codes and experts starts from a checkpoint: real runs, real ranks.

The source has 8 experts and 16 codes, trained for 3 iterations on one rank.
"""

from __future__ import annotations

import itertools
import math

import pytest
from gloo_ranks import RanksFailed
from remap_start import start_remapped
from small_run import PARITY, TINY, layout_overrides, run_on

pytestmark = pytest.mark.distributed

START = [*TINY, "train.eval_iters=2", "optimizer.lr_warmup_iters=0", "optimizer.lr=1e-2"]
START += ["optimizer.min_lr=1e-2"]
DISCRETE = [*START, "vq.path=discrete"]
EP2 = {"expert_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
ETP2 = {"expert_tensor_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def source(ranks, small_corpus, tmp_path_factory):
    """``source(*overrides)`` -> (its folder, its last validation loss); trained once each."""
    known: dict[tuple, tuple] = {}

    def train(*overrides: str):
        if overrides not in known:
            out = tmp_path_factory.mktemp("source")
            every = [*overrides, "train.train_iters=3"]
            records = run_on(ranks(1), small_corpus, out, every, {})[0]["records"]
            known[overrides] = (out / "checkpoints" / "iter_0000003", records[-1]["val/loss"])
        return known[overrides]

    return train


@pytest.fixture
def start(ranks, small_corpus, tmp_path):
    """``start(folder, overrides, num_ranks, layout)`` -> every rank's result, after one step."""
    count = itertools.count()

    def remap(folder, overrides, num_ranks=1, layout=None):
        where = [f"data.path={small_corpus}", f"train.output_dir={tmp_path / str(next(count))}"]
        every = [*where, "train.train_iters=1", *overrides, *layout_overrides(layout or {})]
        return ranks(num_ranks).run(
            start_remapped, str(PARITY), every, str(folder), layout=layout or {}
        )

    return remap


@pytest.mark.parametrize(
    ("changed", "num_ranks", "layout"),
    [
        (["model.num_moe_experts=16"], 1, {}),
        (["vq.num_codes=32"], 1, {}),
        (["model.num_moe_experts=16", "vq.num_codes=48"], 1, {}),
        (["model.num_moe_experts=16"], 2, EP2),
        (["vq.num_codes=32"], 2, TP2),
        (["model.num_moe_experts=24", "vq.num_codes=48"], 2, PP2),
    ],
    ids=["16-experts", "32-codes", "both", "16-experts-ep2", "32-codes-tp2", "both-pp2"],
)
def test_a_multiple_of_experts_or_codes_is_the_same_discrete_function(
    changed, num_ranks, layout, source, start
):
    folder, loss = source(*DISCRETE)
    results = start(folder, [*DISCRETE, *changed], num_ranks, layout)
    for result in results:
        # Ranks sum in another order, and products of other numbers of rows round otherwise.
        assert result["loss"] == pytest.approx(loss, rel=1e-6)
        assert "exactly the same function" in "\n".join(result["said"])
        assert not any(result["needs_data_init"])


def test_copies_are_index_by_index_what_they_claim(source, start):
    folder, _ = source(*START)
    changed = ["model.num_moe_experts=12", "vq.num_codes=24"]
    new = start(folder, [*START, *changed])[0]
    old = start(folder, [*START, "model.num_moe_experts=8", "vq.num_codes=17"])[0]["loaded"]
    loaded, compared = new["loaded"], set()
    for place, tensor in loaded.items():
        name = place.split(" ")[0].split("mlp.")[-1]
        if name.startswith(("router.", "experts.")):
            expected = old[place][[*range(8), *range(4)]]
        elif name == "assigner.codebook.codes":
            expected = old[place][:, [*range(16), *range(8)]]
        elif name.startswith(("assigner.codebook.usage", "assigner.codebook.ema_sum")):
            continue
        elif name == "assigner.code_map.expert_of_row":
            assert tensor.tolist() == [row % 12 for row in range(24)]
            continue
        else:
            expected = old[place]
        compared.add(name)
        assert tensor.equal(expected), place
    assert {"router.weight", "router.bias", "experts.experts.linear_fc1.weight"} <= compared
    assert {"experts.experts.linear_fc2.bias", "assigner.codebook.num_steps"} <= compared


def test_usage_sums_to_one_and_carries_the_ema_sums(source, start):
    folder, _ = source(*START)
    for num_codes in (40, 5):
        loaded = start(folder, [*START, f"vq.num_codes={num_codes}"])[0]["loaded"]
        for layer in (0, 1):
            prefix = "decoder.layers.mlp.assigner.codebook."
            usage = loaded[f"{prefix}usage [{layer}, 0, 0]"]
            codes = loaded[f"{prefix}codes [{layer}, 0, 0, 0]"]
            sums = loaded[f"{prefix}ema_sum [{layer}, 0, 0, 0]"]
            assert usage.shape == (1, num_codes)
            assert usage.sum().item() == pytest.approx(1.0, abs=1e-6)
            assert usage.std() > 0  # the source's shares, not uniform ones
            assert sums.equal(codes * usage.unsqueeze(-1))


def test_other_experts_alone_leave_the_codebook_bitwise(source, start):
    folder, _ = source(*START)
    same = start(folder, [*START, "model.num_moe_experts=16"])[0]["loaded"]
    also = start(folder, [*START, "model.num_moe_experts=4"])[0]["loaded"]
    names = [place for place in same if ".codebook." in place]
    assert len(names) == 10
    assert all(same[place].equal(also[place]) for place in names)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (["model.num_moe_experts=4"], "8 of 16 codes change their expert's function"),
        (["vq.num_codes=10"], "all 10 kept codes keep their expert's function"),
        (["model.num_moe_experts=12"], "4 of 16 codes change their expert's function"),
    ],
    ids=["4-experts", "10-codes", "12-experts"],
)
def test_shrinking_and_odd_sizes_start_and_say_what_changes(changed, sentence, source, start):
    folder, loss = source(*DISCRETE)
    result = start(folder, [*DISCRETE, *changed, "train.train_iters=2"])[0]
    assert sentence in "\n".join(result["said"])
    assert result["loss"] != loss and abs(result["loss"] - loss) < 1.0
    assert len(result["losses"]) == 2 and all(map(math.isfinite, result["losses"]))


@pytest.mark.parametrize(
    ("changed", "layouts"),
    [
        pytest.param(  # EP rank 1: 6, 7, 0..
            ["model.num_moe_experts=12", "vq.num_codes=20"], [EP2, TP2, PP2], marks=pytest.mark.full
        ),
        (["model.num_moe_experts=4", "vq.num_codes=10"], [EP2]),  # EP rank 1: 2, 3
    ],
    ids=["12-experts", "4-experts"],
)
def test_every_layout_starts_as_the_same_model(changed, layouts, source, start):
    folder, _ = source(*START)
    overrides = [*START, *changed]
    one = start(folder, overrides)[0]
    for layout in layouts:
        results = start(folder, overrides, 2, layout)
        for result in results:
            assert result["loss"] == pytest.approx(one["loss"], rel=1e-6)
            assert result["said"] == one["said"]


@pytest.mark.parametrize(
    "layout", [pytest.param(TP2, marks=pytest.mark.full), ETP2], ids=["tp2", "etp2"]
)
def test_halves_of_gated_layers_load_through_their_factories(layout, source, start):
    gated = [*START, "model.gated_linear_unit=true", "model.activation_func=silu"]
    gated += ["model.moe_layer_freq=2", "model.ffn_hidden_size=64", "model.add_bias_linear=false"]
    folder, _ = source(*gated)
    changed = [*gated, "model.num_moe_experts=12"]
    one = start(folder, changed)[0]
    for result in start(folder, changed, 2, layout):
        assert result["loss"] == pytest.approx(one["loss"], rel=1e-6)


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param([], marks=pytest.mark.full), ["optimizer.use_distributed_optimizer=true"]],
    ids=["plain", "distributed-optimizer"],
)
def test_bf16_steps_go_on_from_the_remapped_weights(optimizer, source, start):
    # With the optimizer's own fp32 copies left stale, one step would put the fresh weights back.
    bf16 = [*START, "model.bf16=true", *optimizer]
    folder, _ = source(*bf16)
    slow = ["model.num_moe_experts=16", "optimizer.lr=1e-7", "optimizer.min_lr=0"]
    for result in start(folder, [*bf16, *slow], 2, EP2):
        moved = [
            (result["trained"][place] - tensor).abs().max().item()
            for place, tensor in result["loaded"].items()
            if place.split(" ")[0].endswith("weight")
        ]
        assert len(moved) > 20 and max(moved) < 1e-4


def test_another_tensor_shape_is_refused_by_name_on_all_ranks(source, start):
    folder, _ = source(*START)
    recipe = folder / "run_config.yaml"
    text = recipe.read_text()
    try:  # a checkpoint whose recipe does not say what it holds
        recipe.write_text(text.replace("hidden_size: 32", "hidden_size: 64", 1))
        with pytest.raises(RanksFailed) as refused:
            start(folder, [*START, "model.num_moe_experts=16", "model.hidden_size=64"], 2, EP2)
    finally:
        recipe.write_text(text)
    assert "cannot be remapped to this model" in str(refused.value)
    assert "embedding.word_embeddings.weight: checkpoint [256, 32], this model [256, 64]" in str(
        refused.value
    )


def test_a_refused_recipe_is_refused_before_anything_is_loaded(source, start):
    folder, _ = source(*START)
    with pytest.raises(RanksFailed, match="nothing to remap"):
        start(folder, START)


MEMORY = [
    "code_memory.num_rows=48",
    "code_memory.codes=embedding",
    "code_memory.num_codes=100",
    "code_memory.num_context_codes=6",
]


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "layout"),
    [(16, 1, {}), (4, 2, EP2), (8, 2, ETP2)],
    ids=["16-experts", "4-experts-ep2", "8-experts-etp2"],
)
def test_rows_of_a_code_memory_keep_their_numbers(num_experts, num_ranks, layout, source, start):
    """Row r of a layer is row r div N of expert r mod N, before and after."""
    folder, _ = source(*START, *MEMORY)
    every = [*START, *MEMORY, "vq.num_codes=17"]  # something is remapped in any case
    (old,) = start(folder, every)
    results = start(folder, [*every, f"model.num_moe_experts={num_experts}"], num_ranks, layout)
    for layer in (0, 1):
        (stored,) = (
            tensor
            for place, tensor in old["loaded"].items()
            if "code_memory.weight" in place and f"[{layer}, 0" in place
        )
        assert stored.unique().numel() > stored.numel() // 4  # they were trained
        num_rows, compared = 48 * 5, 0
        assert stored.shape[:2] == (8, num_rows // 8)
        for result in results:
            for place, tensor in result["loaded"].items():
                if "code_memory.weight" not in place or f"[{layer}, " not in place:
                    continue
                _, expert, first, _ = map(int, place.split("[")[1].rstrip("]").split(","))
                for e, j in itertools.product(range(tensor.shape[0]), range(tensor.shape[1])):
                    row = (first + j) * num_experts + expert + e
                    assert tensor[e, j].equal(stored[row % 8, row // 8])
                    compared += 1
        assert compared == num_rows
    said = "\n".join(results[0]["said"])
    assert ("goes to its new owner" in said) == (num_experts != 8)
    for name, table in old["loaded"].items():
        if name.startswith("code_stream."):
            assert results[0]["loaded"][name].equal(table), name
    assert all(math.isfinite(loss) for result in results for loss in result["losses"])
