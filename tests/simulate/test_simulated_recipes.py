"""``vqmoe plan RECIPE --simulate``: every recipe, and the options that change a step.

Recipes keep all their settings except depth, two layers or one for each pipeline chunk, and run on
the fewest ranks that their layout fits on. The simulations share the imports of two processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from counted_ranks import SIZES, SMALL

from vqmoe_megatron.config.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
# Those of a scale differ in experts, codes and ranks alone (tests/test_recipes.py).
OF_A_SCALE = ("tiny_64", "small_128", "billion_256", "multi_billion_64")
RECIPES = [
    path
    for path in sorted((ROOT / "recipes").rglob("*.yaml"))
    if path.parent.name != "studies" and (path.parent.name != "scale" or path.stem in OF_A_SCALE)
]
BYTES = "model.vocab_size=256"
SELECTIVE = "model.recompute_granularity=selective model.recompute_modules="
FULL = "model.recompute_granularity=full model.recompute_num_layers=1 model.recompute_method="
DISTRIBUTED = "optimizer.use_distributed_optimizer=true"
OVERLAP = f"{DISTRIBUTED} optimizer.overlap_grad_reduce=true optimizer.overlap_param_gather=true"
LOW_DIM = "vq.quantizer=low_dim vq.code_dim=8"
PRODUCT = "vq.quantizer=product vq.num_code_slices=2"
FOUR_LAYERS = "model.num_layers=4"
# layout in the short names of SIZES; overrides
OPTIONS = {
    "selective, attention": ("tp2 ep2", f"{SELECTIVE}[core_attn] {PRODUCT}"),
    "selective, all": ("pp2 vpp2", f"{SELECTIVE}[core_attn,moe] {FOUR_LAYERS} {LOW_DIM}"),
    "code memory of rows and contexts": (
        "tp2 pp2 ep2",
        "code_memory.num_rows=64 code_memory.num_codes=20 code_memory.exchange=rows "
        "code_memory.codes=embedding code_memory.num_context_codes=10",
    ),
    "code memory on hidden states": (
        "etp2",
        "code_memory.num_rows=64 code_memory.num_codes=20 code_memory.codes=hidden",
    ),
    "selective, dense layers": (
        "etp2",
        f"{SELECTIVE}[core_attn,mlp,moe] model.moe_layer_freq=2 model.add_bias_linear=false",
    ),
    "selective, attention, kept tables": ("ep2", f"{SELECTIVE}[core_attn] vq.table_per_step=true"),
    "full, uniform, tokens": ("tp2 ep2", f"{FULL}uniform vq.execution=tokens"),
    "full, block, code space": ("pp2 ep2", f"{FULL}block vq.execution=code_space"),
    "cosine, one gradient per code": ("ep2 etp2", "vq.quantizer=cosine vq.straight_through=group"),
    "identity, discrete": ("ep2", "vq.straight_through=identity vq.path=discrete"),
    "none, tokens": ("tp2", f"vq.straight_through=none vq.execution=tokens {OVERLAP}"),
    "residual": ("ep2 etp2", "vq.quantizer=residual vq.num_code_slices=2"),
    "fsq, trained projection": (
        "tp2 ep2",
        "vq.quantizer=fsq vq.code_dim=2 vq.fsq_levels=[4,4] vq.num_codes=16 vq.init=uniform "
        "vq.freeze_codebook=true vq.codebook_update=gradient vq.train_projection=true",
    ),
    "blend": ("ep2", f"vq.expert_input=blend vq.combine=sigmoid {PRODUCT}"),
    "token, trained codes": (
        "tp2 etp2 ep2",
        f"vq.expert_input=token vq.codebook_update=gradient model.bf16=true {DISTRIBUTED}",
    ),
    "learned, reanchored": (
        "pp2 vpp2 ep2",
        f"vq.code_input=learned {LOW_DIM} vq.codebook_update=reanchor {FOUR_LAYERS}",
    ),
    "continuous, gated": (
        "tp2 ep2",
        "vq.path=continuous model.gated_linear_unit=true model.activation_func=silu",
    ),
    "frozen, learned positions, dropout": (
        "tp2",
        "vq.freeze_codebook=true model.position_embedding_type=learned_absolute "
        "model.hidden_dropout=0.1 model.moe_z_loss_coeff=0.001 vq.code_map=balanced",
    ),
    "classes of texts": (
        "pp2 ep2",
        "train.task=finetune finetune.dataset=sst2 finetune.path=texts finetune.num_classes=2 "
        "checkpoint.load=run model.moe_aux_loss_coeff=0 vq.freeze_codebook=true vq.vq_loss_coeff=0",
    ),
    "fewer codes than experts, tied": (
        "pp2",
        "vq.num_codes=3 model.untie_embeddings_and_output_weights=false "
        "model.calculate_per_token_loss=true optimizer.clip_grad=0",
    ),
}


def shallow(path: Path) -> list[str]:
    """``plan`` of a recipe with as many layers as its layout needs."""
    config = load_recipe(path, [])
    parallel = config.parallel
    chunks = parallel.pipeline_model_parallel_size
    chunks *= parallel.virtual_pipeline_model_parallel_size or 1
    vocabulary = [] if config.model.vocab_size or config.vision.is_on else [BYTES]
    return ["plan", str(path), f"model.num_layers={max(4, chunks)}", *vocabulary]


def small(sizes: str, overrides: str) -> list[str]:
    """``plan`` of the parity recipe, smaller, with options."""
    layout = [f"parallel.{SIZES[word.rstrip('248')]}={word[-1]}" for word in sizes.split()]
    recipe = str(ROOT / "recipes" / "parity.yaml")
    return ["plan", recipe, *SMALL, *layout, *overrides.split()]


COMMANDS = {path.relative_to(ROOT / "recipes").as_posix(): shallow(path) for path in RECIPES}
COMMANDS["images at every axis"] = [
    *("plan", str(ROOT / "recipes" / "vision" / "digits.yaml"), "model.num_layers=2"),
    *(f"parallel.{SIZES[axis]}=2" for axis in ("tp", "pp", "ep")),
]
COMMANDS |= {name: small(*option) for name, option in OPTIONS.items()}
NUM_WORKERS = 2
NUMBERS = {name: str(number) for number, name in enumerate(COMMANDS)}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Callable[[str], Any]:
    """Return what the command of a name ended with; all ran in a few processes."""
    folder = tmp_path_factory.mktemp("simulated")
    driver = Path(__file__).with_name("forked_commands.py")
    started = []
    for worker in range(NUM_WORKERS):
        names = list(COMMANDS)[worker::NUM_WORKERS]
        own = folder / str(worker)
        own.mkdir()
        (own / "commands.json").write_text(
            json.dumps({NUMBERS[name]: [*COMMANDS[name], "--simulate", "--json"] for name in names})
        )
        with (own / "output.txt").open("w") as output:
            started.append(
                subprocess.Popen(
                    [sys.executable, str(driver), str(own)],
                    cwd=ROOT,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        for worker, process in enumerate(started):
            assert process.wait(1200) == 0, (folder / f"{worker}/output.txt").read_text()[-3000:]
    finally:
        for process in started:
            process.kill()
    files = {file.stem: file for file in folder.glob("*/[0-9]*.json")}
    return lambda name: json.loads(files[NUMBERS[name]].read_text())


@pytest.mark.full
@pytest.mark.parametrize("name", COMMANDS)
def test_a_simulated_step_sends_what_the_plan_says(name: str, simulated) -> None:  # noqa: ANN001
    code, out, err = simulated(name)
    assert (code, err) == (0, "")
    found = json.loads(out)["simulation"]
    assert found["matches"] is True and found["ranks"]
    assert {rank["pipeline_rank"] for rank in found["ranks"]} >= {0}
    if json.loads(out)["world_size"] > 1:
        assert all(rank["sent_bytes"] > 0 for rank in found["ranks"])
