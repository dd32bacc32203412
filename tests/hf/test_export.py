"""An exported model, read by transformers alone, has the checkpoint's logits and continuations."""

from __future__ import annotations

import json

import pytest
from fast_tier import only
from forked_vqmoe import vqmoe
from hf_model import Reader, answers_of_megatron
from small_run import PARITY, TINY, run_on

pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.distributed

TP, PP, EP = (f"{name}_model_parallel_size" for name in ("tensor", "pipeline", "expert"))
STEPS = [*TINY, "train.train_iters=8", "optimizer.lr_warmup_iters=0", "optimizer.lr=1e-2"]
SMOE = ["vq.path=continuous"]
MEMORY = ["code_memory.num_rows=64"]
FIXED = ["vq.freeze_codebook=true", "vq.codebook_update=gradient", "vq.init=uniform"]
MODELS = {
    "default-ep4": (4, {EP: 4}, [*SMOE, *MEMORY, "code_memory.layers=[1]"]),
    "dual-tp2-ep2": (2, {TP: 2, EP: 2}, []),
    "smoe-pp2-ep2": (4, {PP: 2, EP: 2}, [*SMOE, "model.moe_router_topk=2"]),
    "discrete-product": (
        1, {}, ["vq.path=discrete", "vq.quantizer=product", "vq.num_code_slices=2"],
    ),
    "low-dim-sigmoid": (1, {}, ["vq.quantizer=low_dim", "vq.code_dim=8", "vq.combine=sigmoid"]),
    "cosine-norms": (1, {}, ["vq.quantizer=cosine", "vq.norm=separate"]),
    "residual": (
        1, {}, ["vq.quantizer=residual", "vq.num_code_slices=3", "vq.norm=shared"],
    ),
    "fsq-trained": (
        1,
        {},
        ["vq.quantizer=fsq", "vq.code_dim=3", "vq.fsq_levels=[4, 4, 3]", "vq.num_codes=48",
         "vq.train_projection=true", *FIXED],
    ),
    "lfq-discrete": (
        1, {}, ["vq.quantizer=lfq", "vq.code_dim=5", "vq.num_codes=32", "vq.path=discrete", *FIXED],
    ),
    "contexts": (
        2,
        {EP: 2},
        [*SMOE, *MEMORY, "code_memory.codes=embedding", "code_memory.num_codes=40",
         "code_memory.num_context_codes=6", "code_memory.context_dim=8", "code_memory.gate=token"],
    ),
    "hidden": (1, {}, [*SMOE, *MEMORY, "code_memory.codes=hidden", "code_memory.num_codes=12"]),
    "modern": (
        1,
        {},
        [*SMOE, "model.gated_linear_unit=true", "model.activation_func=silu",
         "model.normalization=RMSNorm", "model.add_bias_linear=false",
         "model.num_query_groups=2", "model.moe_shared_expert_intermediate_size=48",
         "model.untie_embeddings_and_output_weights=false"],
    ),
    "dense-between": (
        1,
        {},
        [*SMOE, "model.num_layers=3", "model.moe_layer_freq=2", "model.ffn_hidden_size=48",
         "model.position_embedding_type=learned_absolute", "model.moe_router_pre_softmax=false",
         "model.moe_router_topk=2"],
    ),
    "filled": (2, {EP: 2}, ["vq.path=filled", "vq.norm=none", "vq.num_fill_experts=3"]),
    "filled-by-threshold": (
        1,
        {},
        ["vq.path=filled", "vq.norm=none", "vq.quantizer=low_dim", "vq.code_dim=8",
         "vq.threshold_routing=true", "vq.fill_values=direct", "model.moe_router_topk=1"],
    ),
    "threshold-alone": (
        1, {}, ["vq.path=filled", "vq.norm=none", "vq.threshold_routing=true",
                "vq.num_fill_experts=0", "vq.quantizer=cosine", "model.moe_router_topk=1"],
    ),
    "one-expert": (1, {}, [*SMOE, "model.num_moe_experts=1", "model.moe_router_topk=1"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    with Reader(tmp_path_factory.mktemp("reader")) as started:
        yield started


@pytest.mark.parametrize("name", only(MODELS, "default-ep4", "dual-tp2-ep2"))
def test_logits_and_greedy_continuations_are_the_checkpoint_s(
    name, ranks, reader, small_corpus, tmp_path
):
    num_ranks, layout, overrides = MODELS[name]
    every = [*STEPS, *overrides]
    run_on(ranks(num_ranks), small_corpus, tmp_path / "run", every, layout)
    done = vqmoe("export", tmp_path / "run", "--hf", tmp_path / "hf", "--max-shard-bytes", 40000)
    assert done.returncode == 0, done.stderr
    where = [f"data.path={small_corpus}", f"train.output_dir={tmp_path / 'run'}"]
    (ours,) = ranks(1).run(answers_of_megatron, str(PARITY), [*every, *where])
    found = reader.answers(tmp_path / "hf", ours["tokens"], name != "hidden")
    difference = float((found["logits"] - ours["logits"]).abs().max())
    assert difference < 1e-5 * max(1.0, float(ours["logits"].abs().max()))
    for kind in ("cached", "uncached"):
        if kind in found:
            assert found[kind].equal(ours["greedy"]), kind
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1


def test_a_model_without_such_a_form_is_refused_before_anything_is_written(
    ranks, small_corpus, tmp_path
):
    run_on(ranks(1), small_corpus, tmp_path / "run", [*STEPS, "vq.expert_input=blend"], {})
    done = vqmoe("export", tmp_path / "run", "--hf", tmp_path / "hf")
    assert done.returncode == 2 and "vq.expert_input=blend has no Hugging Face form" in done.stderr
    assert not (tmp_path / "hf").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    done = vqmoe("export", tmp_path / "run", "--hf", tmp_path / "mine")
    assert done.returncode == 2
    assert (tmp_path / "mine" / "file").read_text() == "mine"
