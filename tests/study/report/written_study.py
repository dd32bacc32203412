"""Studies written in the real format with known losses, for tests that need many runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import yaml

from vqmoe_megatron.config import ModelConfig, RunConfig, TrainConfig, VQConfig
from vqmoe_megatron.config.recipe import save_recipe
from vqmoe_megatron.rundir.status import write_status
from vqmoe_megatron.track.metrics_log import MetricsLog

ROUTERS = {"smoe": "continuous", "smoe_top2": "continuous", "vq": "dual"}
TOPK = {"smoe_top2": 2}
LAWS = {  # floor, coefficient, exponent
    "smoe": (1.30, 1.10, 0.45),
    "smoe_top2": (1.27, 1.10, 0.5),
    "vq": (1.25, 1.10, 0.55),
}
NUM_STEPS, EVAL_EVERY = 40, 4


def config_of(path: Path, experts: int, router: str, seed: int, ranks: int = 1) -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            moe_ffn_hidden_size=64,
            num_moe_experts=experts,
            moe_router_topk=TOPK.get(router, 1),
            seq_length=32,
            vocab_size=256,
        ),
        vq=VQConfig(num_codes=4 * experts, path=ROUTERS[router]),
        train=TrainConfig(
            output_dir=str(path),
            train_iters=NUM_STEPS,
            global_batch_size=8 * ranks,
            micro_batch_size=2,
            seed=seed,
        ),
    )


def loss_at(experts: int, router: str, seed: int, iteration: int, noise: float = 0.01) -> float:
    """A power law at the end, a fall over the iterations, and a shift that belongs to the seed."""
    floor, coefficient, exponent = LAWS[router]
    final = floor + coefficient * experts**-exponent
    shift = noise * math.sin(12.9898 * seed + 78.233 * math.log2(experts) + len(router))
    return final + shift + 2.5 * (1 - iteration / NUM_STEPS) / (1 + iteration)


def write_records(
    run_dir: Path, config: RunConfig, router: str, until: int, ranks: int, diverged_at: float
) -> None:
    experts, seed = config.model.num_moe_experts, config.train.seed
    per_step = config.train.global_batch_size * config.model.seq_length
    with MetricsLog(run_dir) as log:
        for iteration in range(until + 1):
            record = {"iteration": iteration, "consumed_tokens": iteration * per_step}
            if iteration:
                slow = 5 if iteration == 1 else 1
                record |= {
                    "loss": loss_at(experts, router, seed, iteration) + 0.02,
                    "tokens_per_second": 4000 * ranks**0.9 / experts**0.2 / slow + iteration,
                    "moe/expert_load_imbalance": 1 + experts / 32 + iteration / 100,
                }
                if router == "vq":
                    record |= {
                        "vq/code_perplexity": 2.0 * experts - iteration / 100,
                        "vq/dead_codes": float(experts // 4 + iteration % 3),
                    }
            if iteration % EVAL_EVERY == 0:
                finite = loss_at(experts, router, seed, iteration)
                loss = finite if iteration < diverged_at else math.nan
                record |= {"val/loss": loss, "val/bits_per_byte": loss / math.log(2)}
            log.append(record)


def write_study(
    directory: Path,
    sizes=(4, 8, 16, 32, 64, 128),
    routers=("smoe", "vq"),
    seeds=(1, 2),
    num_ranks=(1,),
    states: dict[str, tuple[str, int]] | None = None,
    diverged: dict[str, int] | None = None,
    baseline: str | list[str] | None = None,
) -> Path:
    """Write a study. ``states``: run name -> (state, iteration), other than completed; the state
    ``pending`` writes no run directory. ``diverged``: run name -> iteration from which its
    validation losses are not finite. Batches grow with ``num_ranks``: weak scaling."""
    runs_folder, states, diverged = directory / "runs", states or {}, diverged or {}
    runs_folder.mkdir(parents=True)
    entries = []
    for experts in sizes:
        for router in routers:
            for ranks in num_ranks:
                for seed in seeds:
                    name = f"experts{experts}-{router}-ranks{ranks}-seed{seed}"
                    run_dir = runs_folder / name
                    point = {"experts": experts, "router": router, "ranks": ranks, "seed": seed}
                    entries.append(
                        {
                            "index": len(entries),
                            "name": name,
                            "run_dir": str(run_dir),
                            "point": point,
                            "overrides": [
                                f"model.num_moe_experts={experts}",
                                f"vq.path={ROUTERS[router]}",
                                f"model.moe_router_topk={TOPK.get(router, 1)}",
                                f"vq.num_codes={4 * experts}",
                                f"train.global_batch_size={8 * ranks}",
                                f"train.seed={seed}",
                            ],
                            "num_ranks": ranks,
                        }
                    )
                    state, until = states.get(name, ("completed", NUM_STEPS))
                    if state != "pending":
                        config = config_of(run_dir, experts, router, seed, ranks)
                        save_recipe(config, run_dir / "run_config.yaml")
                        diverged_at = diverged.get(name, math.inf)
                        write_records(run_dir, config, router, until, ranks, diverged_at)
                        write_status(run_dir, state, until, "written for a test")
    base = config_of(directory / "none", sizes[0], routers[0], seeds[0])
    save_recipe(replace(base, vq=VQConfig(num_codes=16)), directory / "recipe.yaml")
    study = {
        "name": "written",
        "output_dir": str(directory),
        "recipe": str(directory / "recipe.yaml"),
        "rule": "equal_tokens",
        "baseline": baseline,
    }
    (directory / "study.yaml").write_text(yaml.safe_dump({"study": study, "grid": {}}))
    (directory / "runs.json").write_text(json.dumps(entries))
    return directory
