"""A whole step of the real model mixes no devices, waits for the device only where it is named, and
copies nothing from pageable memory; what is planted is seen.

The steps run in one process (``pure_steps``), whose CUDA is the meta device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_ranks import small_recipe
from fast_tier import covering

from vqmoe_megatron.plan.layout import check_layout
from vqmoe_megatron.plan.step_end_memory import save_bytes
from vqmoe_megatron.runtime.cpu_compat.meta_device import answered_reads
from vqmoe_megatron.runtime.device_purity import DevicePurity, ImpureStep
from vqmoe_megatron.runtime.host_synchronisations import OF_EVERY_STEP, OF_THE_FIRST_STEP

FIRST_STEP = "first step"
ROOT = Path(__file__).resolve().parents[2]
PATHS_OF_HELPERS = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "simulate")]
NUM_MICROBATCHES = 2  # of pure_steps
SMALL = ["model.num_layers=1"]
BF16, DISTRIBUTED = "model.bf16=true", "optimizer.use_distributed_optimizer=true"
DISPATCH = "vqmoe_megatron.moe.dispatch:dispatch"

EXECUTIONS = {
    "tokens": "vq.execution=tokens",
    "code space": "vq.execution=code_space",
    "kept table": "vq.table_per_step=true",
}
QUANTIZERS = {
    "euclidean": "",
    "cosine": "vq.quantizer=cosine",
    "product": "vq.quantizer=product vq.num_code_slices=2",
    "low_dim": "vq.quantizer=low_dim vq.code_dim=8",
    "residual": "vq.quantizer=residual vq.num_code_slices=2",
}
PATHS = {
    "softmax": "",
    "sigmoid": "vq.combine=sigmoid",
    "discrete": "vq.path=discrete",
}
NUMBERS = {"fp32": "", "bf16": f"{BF16} {DISTRIBUTED}"}
AXES = (
    EXECUTIONS,
    QUANTIZERS,
    ("ema", "gradient", "reanchor"),
    ("codebook", "learned"),
    ("token", "group", "identity", "none"),
    PATHS,
    ("", "ep2", "tp2 ep2 etp2"),
    NUMBERS,
)
LAYER_CASES = covering(list(product(*AXES)))


def overrides_of(case: tuple[str, ...]) -> list[str]:
    """The recipe's overrides of one case."""
    execution, quantizer, update, inputs, gradient, path, _, numbers = case
    words = [EXECUTIONS[execution], QUANTIZERS[quantizer], PATHS[path], NUMBERS[numbers]]
    words += [f"vq.codebook_update={update} vq.code_input={inputs} vq.straight_through={gradient}"]
    return " ".join(words).split()


FULL = "model.recompute_granularity=full model.recompute_num_layers=1 model.recompute_method="
OVERLAP = f"{DISTRIBUTED} optimizer.overlap_grad_reduce=true optimizer.overlap_param_gather=true"
MEMORY = "code_memory.num_rows=64 code_memory.codes=embedding code_memory.num_codes=32"
MEMORY += " code_memory.num_context_codes=8"
# layout, overrides, what is planted or which step is watched
OTHER_CASES = {
    "continuous": ("ep2", f"vq.path=continuous {BF16}", ""),
    "blend": ("", f"vq.expert_input=blend model.gated_linear_unit=true {BF16}", ""),
    "blend_convex, dropout": (
        "ep2", f"vq.expert_input=blend_convex model.hidden_dropout=0.1 {BF16}", "",
    ),
    "filled": ("ep2", f"vq.path=filled {BF16}", ""),
    "filled, kept table": ("etp2", f"vq.path=filled vq.table_per_step=true {BF16}", ""),
    "filled, learned rows": (
        "tp2 ep2 etp2", f"vq.path=filled vq.fill_values=direct {BF16} {DISTRIBUTED}", "",
    ),
    "threshold": (
        "ep2", f"vq.path=filled vq.threshold_routing=true model.moe_router_topk=1 {BF16}", "",
    ),
    "token, low_dim": ("", f"vq.expert_input=token {QUANTIZERS['low_dim']} {BF16}", ""),
    "no norms, z-loss": ("ep2", f"vq.norm=none model.moe_z_loss_coeff=0.001 {BF16}", ""),
    "frozen, no biases": ("", f"vq.freeze_codebook=true model.add_bias_linear=false {BF16}", ""),
    "frozen later, revival by error": (
        "",
        f"vq.codebook_update=gradient vq.freeze_after_steps=1 vq.revival=error {BF16} "
        f"{DISTRIBUTED} vq.dead_code_threshold=0.5",
        "",
    ),
    "pipeline": ("pp2 ep2", f"{BF16} model.num_layers=2", ""),
    "interleaved": ("pp2 vpp2", f"{BF16} model.num_layers=4", ""),
    "full recompute": ("", f"{BF16} {FULL}uniform", ""),
    "selective recompute": (
        "", f"{BF16} model.recompute_granularity=selective model.recompute_modules=[core_attn,moe]",
        "",
    ),
    "overlap": ("dp2", f"{BF16} {OVERLAP}", ""),
    "per-token loss, no clipping": (
        "tp2", f"{BF16} model.calculate_per_token_loss=true optimizer.clip_grad=0", "",
    ),
    "code memory, rows": ("ep2", f"{MEMORY} code_memory.exchange=rows {BF16} {DISTRIBUTED}", ""),
    "code memory, table": ("tp2 ep2", f"{MEMORY} code_memory.exchange=table {BF16}", ""),
    "code memory, one owner": ("", f"{MEMORY} code_memory.gate=token {BF16} {FULL}uniform", ""),
    "code memory, made by experts": (
        "ep2", f"{MEMORY} code_memory.values=experts code_memory.exchange=table {BF16}", "",
    ),
    "code memory, hidden": ("", f"code_memory.num_rows=64 code_memory.codes=hidden {BF16}", ""),
    "first step, balanced": ("", f"{BF16} vq.init=kmeans vq.code_map=balanced", FIRST_STEP),
    "first step, clustered": ("", f"{BF16} vq.init=data vq.code_map=clustered", FIRST_STEP),
}  # fmt: skip
SAVES = {
    "save, plain": ("dp2", BF16),
    "save, distributed": ("dp2", f"{BF16} {DISTRIBUTED}"),
    "save, fp32, experts": ("ep2", DISTRIBUTED),
    "save, buckets": ("tp2 ep2", f"{BF16} {OVERLAP}"),
}
PLANTS = ("host arange", "host matrix", "host number", "item", "item backward", "copy")


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[str, Any]:
    """What was found in the step of each case."""
    cases = {"-".join(case): [case[6], overrides_of(case), ""] for case in LAYER_CASES}
    cases |= {
        name: [sizes, words.split(), plant] for name, (sizes, words, plant) in OTHER_CASES.items()
    }
    cases |= {plant: ["", [BF16], plant] for plant in PLANTS}
    cases |= {name: [sizes, words.split(), "save"] for name, (sizes, words) in SAVES.items()}
    cases = {name: [sizes, SMALL + words, plant] for name, (sizes, words, plant) in cases.items()}
    folder = tmp_path_factory.mktemp("pure_steps")
    (folder / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("pure_steps.py")
    with (folder / "output.txt").open("w") as output:
        ended = subprocess.run(
            [sys.executable, str(script), str(folder)],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=600,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(PATHS_OF_HELPERS),
                "OMP_NUM_THREADS": "1",
            }
            | {"CUDA_VISIBLE_DEVICES": ""},  # these are CPU tests wherever they run
        )
    assert ended.returncode == 0, (folder / "output.txt").read_text()[-3000:]
    return json.loads((folder / "found.json").read_text())


def seen_in(found: dict[str, Any]) -> list[list[str]]:
    assert "seen" in found, found.get("refused") or found.get("crashed")
    return found["seen"]


@pytest.mark.parametrize("case", LAYER_CASES, ids="-".join)
def test_every_layer_waits_at_named_places_only(case: tuple[str, ...], steps) -> None:  # noqa: ANN001
    seen = seen_in(steps["-".join(case)])
    assert {place for _, _, place in seen} <= set(OF_EVERY_STEP)
    assert "pageable copy" not in {kind for kind, _, place in seen if place.startswith("vqmoe")}
    # Split sizes: forward where rows travel, backward where code space sends gradients.
    execution, *_, gradient, path, sizes, _ = case
    in_code_space = execution != "tokens"
    per_layer = (path != "discrete" or not in_code_space) + (
        in_code_space and gradient in ("token", "group")
    )
    num_reads = sum(place == DISPATCH for _, _, place in seen)
    assert num_reads == (per_layer * NUM_MICROBATCHES if sizes else 0)


@pytest.mark.parametrize("name", OTHER_CASES)
def test_every_kind_of_step_waits_at_named_places_only(name: str, steps) -> None:  # noqa: ANN001
    allowed = set(OF_EVERY_STEP)
    if OTHER_CASES[name][2] == FIRST_STEP:
        allowed |= set(OF_THE_FIRST_STEP)
    seen = seen_in(steps[name])
    assert seen and {place for _, _, place in seen} <= allowed


def test_every_name_in_the_table_is_needed(steps) -> None:  # noqa: ANN001
    places = {place for found in steps.values() for _, _, place in found.get("seen", [])}
    assert set(OF_EVERY_STEP) | set(OF_THE_FIRST_STEP) <= places


@pytest.mark.parametrize("plant", ["host arange", "host matrix"])
def test_a_stray_host_tensor_in_the_layer_is_refused(plant: str, steps) -> None:  # noqa: ANN001
    assert "mixes tensors of meta with host tensors" in steps[plant]["refused"]
    assert "evaluate_planted" in steps[plant]["refused"]


@pytest.mark.parametrize(
    ("plant", "kind", "function"),
    [
        ("item", "host read", "planted_item"),
        ("item backward", "host read", "read_in_backward"),
        ("copy", "pageable copy", "planted_copy"),
    ],
)
def test_a_wait_in_the_layer_is_seen(plant: str, kind: str, function: str, steps) -> None:  # noqa: ANN001
    seen = {(k, place) for k, _, place in seen_in(steps[plant]) if place not in OF_EVERY_STEP}
    assert seen == {(kind, f"__main__:{function}")}


def test_a_host_number_is_legal(steps) -> None:  # noqa: ANN001
    assert {place for _, _, place in seen_in(steps["host number"])} <= set(OF_EVERY_STEP)


@pytest.mark.parametrize("name", SAVES)
def test_a_save_makes_on_the_device_what_is_planned(name: str, steps) -> None:  # noqa: ANN001
    sizes, words = SAVES[name]
    layout = {word[:-1]: int(word[-1]) for word in sizes.split()}
    layout.pop("dp", None)
    config = small_recipe(layout, [*SMALL, *words.split()])
    planned = save_bytes(config, check_layout(config, 2, "cpu"), 0)
    assert steps[name]["peak_bytes"] == planned
    assert (planned > 0) == config.optimizer.use_distributed_optimizer


X = torch.zeros(4, 3, device="meta")
IDS = torch.zeros(4, dtype=torch.int64, device="meta")
READS: dict[str, Callable[[], Any]] = {
    "item": lambda: X[0, 0].item(),
    "bool": lambda: bool(X[0, 0] > 0),
    "int": lambda: int(IDS[0]),
    "tolist": lambda: X.tolist(),
    "cpu": lambda: X.cpu(),
    "to, not blocking for nothing": lambda: torch.zeros(4, 3).copy_(X, non_blocking=True),
    "numpy": lambda: X.numpy(force=True),
    "equal": lambda: torch.equal(X, X),
    "nonzero": lambda: X.nonzero(),
    "boolean index": lambda: X[X > 0],
    "boolean index, written": lambda: X.clone().index_put_((X > 0,), torch.ones(2, device="meta")),
    "masked_select": lambda: X.masked_select(X > 0),
    "bincount": lambda: IDS.bincount(),
    "unique": lambda: IDS.unique(),
    "repeat_interleave": lambda: IDS.repeat_interleave(IDS),
}
COPIES: dict[str, Callable[[], Any]] = {
    "to": lambda: torch.zeros(3).to("meta"),
    "to, not blocking, not pinned": lambda: torch.zeros(3).to("meta", non_blocking=True),
    "copy_": lambda: X.clone().copy_(torch.zeros(4, 3)),
    "host index": lambda: X[torch.tensor([0, 1])],
    "list as index": lambda: X[[0, 1]],
}
NEITHER: dict[str, Callable[[], Any]] = {
    "arithmetic": lambda: (X + 1.0) @ X.t(),
    "host number": lambda: X * torch.tensor(2.0),
    "filled": lambda: torch.full((3,), 2.0, device="meta"),
    "not blocking to the host": lambda: X.to("cpu", non_blocking=True),
    "index": lambda: X[IDS],
    "one number by a mask": lambda: X.clone().__setitem__(X > 0, 0.0),
    "repeat_interleave of a known size": lambda: IDS.repeat_interleave(IDS, output_size=7),
    "host alone": lambda: torch.arange(3).tolist() + [torch.ones(()).item()],
}


def seen_by(call: Callable[[], Any]) -> set[str]:
    """Kinds of what one call asked of the host; where a shape has no answer it ends there."""
    with answered_reads(), DevicePurity("meta") as purity:
        try:
            call()
        except (NotImplementedError, RuntimeError) as error:
            assert not isinstance(error, ImpureStep), error
    assert purity.unexpected([f"{__name__}:seen_by"]) == []
    assert len(purity.unexpected([])) == len(set(purity.seen))
    return {one.kind for one in purity.seen}


@pytest.mark.parametrize("name", READS)
def test_a_read_is_seen(name: str) -> None:
    assert seen_by(READS[name]) == {"host read"}


@pytest.mark.parametrize("name", COPIES)
def test_a_pageable_copy_is_seen(name: str) -> None:
    assert seen_by(COPIES[name]) == {"pageable copy"}


@pytest.mark.parametrize("name", NEITHER)
def test_what_does_not_wait_is_not_seen(name: str) -> None:
    assert seen_by(NEITHER[name]) == set()


@pytest.mark.parametrize(
    "call",
    [
        lambda: X + torch.zeros(3),
        lambda: X @ torch.zeros(3, 3),
        lambda: torch.cat([X, torch.zeros(1, 3)]),
        lambda: X.index_select(0, torch.tensor([1])),
        lambda: torch.where(torch.ones(4, 3, dtype=torch.bool), X, X),
    ],
)
def test_mixed_devices_are_refused(call: Callable[[], Any]) -> None:
    with DevicePurity("meta"), pytest.raises(ImpureStep, match="mixes tensors of meta"):
        call()
