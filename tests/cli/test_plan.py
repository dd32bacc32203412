"""``vqmoe plan`` as it is typed: tables, JSON, refusals with exit code 2, search, simulation."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest
from toy_package import pretend_installed

from vqmoe_megatron import cli, registry
from vqmoe_megatron.cli import plan as plan_commands
from vqmoe_megatron.plan.layout import check_layout
from vqmoe_megatron.plan.step_wire import step_wire
from vqmoe_megatron.plan.wire import Exact
from vqmoe_megatron.simulate.simulated_step import SimulatedRank, SimulatedStep

RECIPE = str(Path(__file__).resolve().parents[2] / "recipes" / "parity.yaml")
VOCABULARY = "model.vocab_size=300"
EP2 = "parallel.expert_model_parallel_size=2"


@pytest.fixture
def vqmoe(monkeypatch, capsys):
    """Run the command in this process: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vqmoe", "plan", RECIPE, *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return ended.value.code, shown.out, shown.err

    return run


def test_a_package_s_router_is_counted_as_ours_and_said(vqmoe, monkeypatch) -> None:
    pretend_installed(monkeypatch, {"router.mine": "my_package:Mine"})  # which is not imported
    code, out, _ = vqmoe(VOCABULARY, "model.moe_router=mine")
    registry._installed.cache_clear()
    assert code == 0
    assert "assumed: model.moe_router=mine is not of this package" in " ".join(out.split())
    assert "those of topk" in " ".join(out.split())
    assert "is not of this package" not in vqmoe(VOCABULARY)[1]


def test_tables_say_what_is_planned_and_what_is_assumed(vqmoe) -> None:
    code, out, err = vqmoe(VOCABULARY, EP2, "--world-size", "4", "--hardware", "CPU")
    assert code == 0 and err == ""
    for text in (
        "rank grid of 4 ranks", "experts and codes", "row mod 8 in 4..7", "used by one token",
        "memory of a rank", "operations of a step", "sent by a rank", "predicted step on CPU",
        "Not in the memory figures", "no GPU figure was measured",
    ):  # fmt: skip
        assert text in out
    assert "assumed: model.vocab_size" not in out


def test_a_dense_model_and_a_shared_expert_are_called_so(vqmoe) -> None:
    one = ["model.num_moe_experts=1", "model.moe_router_topk=1", "vq.path=continuous"]
    _, out, _ = vqmoe(VOCABULARY, *one)
    assert "1 of width 64 for every token: dense, no router" in " ".join(out.split())
    shared = ["model.moe_shared_expert_intermediate_size=32", "model.add_bias_linear=false"]
    _, out, _ = vqmoe(VOCABULARY, *shared)
    assert "top-2, and a shared one of width 32" in " ".join(out.split())
    assert "shared_experts" in out and "shared expert" in out


def test_the_parts_of_a_stage_add_up_with_its_copy_of_the_tied_table(vqmoe) -> None:
    stages = "parallel.pipeline_model_parallel_size=2"
    code, out, _ = vqmoe(VOCABULARY, stages, "--world-size", "2", "--hardware", "CPU")
    table = out[out.index("used by one token") : out.index("memory of a rank")]
    rows = [line.split() for line in table.splitlines() if len(line.split()) == 5]
    counts = {row[0]: int(row[-1].replace(",", "")) for row in rows if row[-1][0].isdigit()}
    assert code == 0 and counts["output_layer"] > 0
    assert sum(counts.values()) == 2 * counts["all"]


BATCH = "train.global_batch_size"
LAYERS = "model.num_layers=2000"
STAGES, CHUNKS, EXPERTS = (
    f"parallel.{name}_parallel_size"
    for name in ("pipeline_model", "virtual_pipeline_model", "expert_model")
)
MICRO = "train.micro_batch_size=1"
WIDTHS = [
    f"model.{name}={2**20}"
    for name in ("hidden_size", "kv_channels", "moe_ffn_hidden_size", "num_moe_experts")
]


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ([LAYERS, f"{STAGES}=2", f"{CHUNKS}=1000", f"{BATCH}={2**24}", MICRO], 0),
        ([LAYERS, f"{STAGES}=2000", f"{BATCH}={2**24}", MICRO], 0),
        ([*WIDTHS, f"model.seq_length={2**24}", f"vq.num_codes={2**24}"], 0),
        ([f"model.num_moe_experts={2**20}", f"{EXPERTS}={2**17}", f"{BATCH}={2**20}"], 0),
        ([f"{EXPERTS}={2**17}", f"{STAGES}={2**17}"], 2),  # no such world
        (["model.num_layers=2147483648"], 2),
    ],
)
def test_what_is_legal_is_planned_in_seconds(vqmoe, settings: list[str], code: int) -> None:
    """At most as long as 200 plans of the plain recipe; 31 were measured."""

    def seconds_of(*settings: str) -> tuple[float, int, str]:
        started = time.process_time()
        found, _, error = vqmoe(VOCABULARY, *settings)
        return time.process_time() - started, found, error

    plain = min(seconds_of()[0] for _ in range(3))
    seconds, found, error = seconds_of(*settings)
    assert found == code and bool(error) == bool(code)
    assert seconds < 200 * plain


@pytest.mark.parametrize("as_json", [False, True])
def test_a_world_that_does_not_divide(vqmoe, as_json: bool) -> None:
    options = ["--json"] if as_json else []
    code, out, err = vqmoe(VOCABULARY, EP2, "--world-size", "3", *options)
    rule = "world_size % (EP * ETP * PP = 2 * 1 * 1) != 0: 3 % 2 = 1; use a multiple of 2 ranks"
    assert code == 2
    if as_json:
        assert err == "" and json.loads(out)["errors"][0].startswith(rule)
    else:
        assert out == "" and "cannot run on 3 ranks" in err and rule in err


def test_json_is_one_object(vqmoe) -> None:
    code, out, _ = vqmoe(VOCABULARY, "--json")
    described = json.loads(out)
    assert code == 0 and described["world_size"] == 1
    for key in ("rank_grid", "parameters", "memory_bytes", "flops_per_step"):
        assert described[key]
    assert described["wire_bytes_per_step"]["total"] == 0  # one rank sends nothing
    assert described["errors"] == []


def test_fp8_is_planned_and_told_that_it_would_be_refused_here(vqmoe) -> None:
    code, out, _ = vqmoe(VOCABULARY, "model.fp8=hybrid", "vq.execution=tokens")
    said = " ".join(out.split())
    assert code == 0 and "would be refused on this machine: transformer_engine is not" in said


def test_vocabulary_is_the_corpus_s_or_an_assumption_that_is_told(vqmoe, tmp_path) -> None:
    from vqmoe_megatron.data.prepare import prepare_corpus

    nowhere = f"data.path={tmp_path / 'nowhere'}"
    code, out, _ = vqmoe(nowhere)
    assert code == 0 and "assumed: model.vocab_size=32000" in out and "no corpus directory" in out
    text = tmp_path / "text.txt"
    text.write_text("a few words\n" * 400)
    prepare_corpus("text", tmp_path / "corpus", [text], "byte", None, False, False)
    code, out, _ = vqmoe(f"data.path={tmp_path / 'corpus'}", "--json")
    described = json.loads(out)
    assert described["config"]["model"]["vocab_size"] < 300
    assert not any("vocab_size" in sentence for sentence in described["assumptions"])


def test_big_worlds_are_summarised(vqmoe) -> None:
    options = [VOCABULARY, EP2, "train.global_batch_size=4096", "--world-size", "4096"]
    code, out, _ = vqmoe(*options)
    assert code == 0 and "rank grid of 4096 ranks" in out
    assert len(out.splitlines()) < 200 and " 4095 " in out


def test_search_names_the_best_and_counts_the_others(vqmoe) -> None:
    code, out, _ = vqmoe(VOCABULARY, "model.num_layers=2", "--world-size", "2", "--search",
                         "--hardware", "CPU")  # fmt: skip
    assert code == 0 and "best layouts of 2 ranks on CPU" in out
    assert "why the others fell out" in out and "num_layers % (PP * VPP)" in out
    assert [line.split()[1] for line in out.splitlines() if "(recipe)" in line] == ["(recipe)"]


def test_search_shows_why_the_recipe_s_own_layout_cannot_run(vqmoe) -> None:
    options = ["--world-size", "3", "--search", "--hardware", "CPU", "train.global_batch_size=3"]
    code, out, err = vqmoe(VOCABULARY, EP2, *options)
    assert (code, err) == (0, "")
    assert re.search(r"^ - \(recipe\) +1 +1 +- +- +2 ", out, re.MULTILINE)
    assert "recipe: world_size % (EP * ETP * PP = 2 * 1 * 1) != 0: 3 % 2 = 1" in out
    _, out, _ = vqmoe(VOCABULARY, EP2, *options, "--json")
    own = json.loads(out)["search"]["recipe"]
    assert own["rank"] is None and own["errors"] == json.loads(out)["errors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "TPU"], "hardware 'TPU' is not known; choose one of H100"),
        (["vq.num_code=8"], "did you mean"),
        (["--world-size", "0"], "--world-size"),
    ],
)
def test_refusals(vqmoe, arguments: list[str], message: str) -> None:
    code, _, err = vqmoe(VOCABULARY, *arguments)
    assert code == 2 and message in err


def test_a_simulation_that_differs_ends_with_1(vqmoe, monkeypatch) -> None:
    def simulated(change: Exact):
        def simulate(config, world_size):
            planned = step_wire(config, check_layout(config, world_size, "cpu"))
            counted = dict(planned.stages[0].by_collective)
            key = next(iter(counted))
            counted[key] = (counted[key][0], counted[key][1] + change)
            ranks = (SimulatedRank(0, 0, 1, counted, 1.0),)
            return SimulatedStep(
                world_size=world_size,
                num_microbatches=1,
                num_microbatches_of_run=1,
                ranks=ranks,
                planned=planned,
                seconds=1.0,
                cpu_seconds=1.0,
                peak_memory_bytes=1,
                notes=("a note",),
            )

        return simulate

    options = [VOCABULARY, EP2, "--world-size", "2", "--simulate"]
    monkeypatch.setattr(plan_commands, "simulate_step", simulated(0))
    code, out, _ = vqmoe(*options)
    assert code == 0 and "note: a note" in out and "DIFFER" not in out
    monkeypatch.setattr(plan_commands, "simulate_step", simulated(8))
    code, out, _ = vqmoe(*options)
    assert code == 1 and "PLAN AND SIMULATION DIFFER" in out
    code, out, _ = vqmoe(*options, "--json")
    assert code == 1 and json.loads(out)["simulation"]["matches"] is False
