"""What a user reads: help texts, plans, prepared files, wire bytes, the documented Python API."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from checkout import Checkout, file_hash
from run_files import file_names
from training_curves import COMMON, LAYOUTS, RECIPE

API_PROGRAM = Path(__file__).resolve().with_name("python_api.py")
MEASURED = ("seconds", "cpu_seconds", "peak_memory_bytes")  # of a simulation
ORIGIN = ("machine", "versions", "commit", "uncommitted_changes")  # of a benchmark
STUDY = "recipes/studies/stdlib_experts.yaml"


def observe_help(checkout: Checkout) -> dict[str, Any]:
    """Return the help text of every command and sub-command, found in their own help texts."""
    found: dict[str, Any] = {"version": checkout.run("--version").stdout}
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        words = waiting.pop(0)
        ended = checkout.run(*words, "--help")
        found[" ".join(("vqmoe", *words))] = checkout.stable(ended.stdout)
        waiting += [(*words, name) for name in listed_commands(ended.stdout)]
    return _with_failures(found, len(found) < 5, "help lists no commands")


def listed_commands(help_text: str) -> list[str]:
    """Return the names in the box ``Commands`` of a help text; further lines are indented more."""
    _, _, box = help_text.partition("─ Commands ")
    return re.findall(r"^│ ([\w-]+) ", box.partition("╰")[0], re.MULTILINE)


def observe_plans(checkout: Checkout) -> dict[str, Any]:
    """Return the plan of every recipe as text, and the study's runs."""
    folder = checkout.path / "recipes"
    recipes = [name for name in file_names(folder) if not name.startswith("studies/")]
    found = {name: _said(checkout, "plan", f"recipes/{name}") for name in recipes}
    (checkout.work / "empty.yaml").write_text("model: {vocab_size: 256}\n")
    found["a recipe of defaults, resolved"] = _said(checkout, "plan", "empty.yaml", "--json")
    eight = (f"recipes/{recipes[-1]}", "--world-size", "8")
    found["8 ranks, search"] = _said(checkout, "plan", *eight, "--search")
    found["study list"] = _said(checkout, "study", "list", STUDY)
    return _with_failures(found, len(recipes) < 2, f"{folder} has {len(recipes)} recipes")


def observe_prepare(checkout: Checkout) -> dict[str, Any]:
    """Return the files of corpora by three tokenizers, and what was printed."""
    found: dict[str, Any] = {}
    for tokenizer in ("byte", "char", "word"):
        name = f"prepared_{tokenizer}"
        size = ("--vocab-size", "300") if tokenizer == "word" else ()
        source = ("text", "--input", "text.txt", "--out", name, "--tokenizer", tokenizer)
        found[f"{tokenizer}: said"] = _said(checkout, "prepare", *source, *size)
        for file in file_names(checkout.work / name):
            found[f"{tokenizer}: {file}"] = file_hash(checkout.work / name / file)
    return found


def observe_step_wire(checkout: Checkout, layout: str) -> dict[str, Any]:
    """Return the plan and the count of a real step's bytes, collective by collective."""
    num_ranks, sizes = LAYOUTS[layout]
    world = ("--world-size", str(num_ranks), "--simulate", "--json")
    ended = checkout.run_apart("plan", RECIPE, "model.vocab_size=256", *COMMON, *sizes, *world)
    if ended.returncode:
        return {"failures": [checkout.stable(ended.stderr)[-500:]]}
    plan = _without(json.loads(ended.stdout), MEASURED)
    return _with_failures(plan, not plan.get("simulation"), "the plan holds no simulation")


def observe_layer_wire(checkout: Checkout, layouts: str) -> dict[str, Any]:
    """Return the bytes that every arm of ``vqmoe bench wire`` sends on real ranks."""
    ended = checkout.run(
        "bench", "wire", "--layouts", layouts, "--num-tokens", "64", "--json", "wire.json"
    )
    if ended.returncode:
        return {"failures": [checkout.stable(ended.stdout)[-500:]]}
    measured = _without(json.loads((checkout.work / "wire.json").read_text()), ORIGIN)
    found = {
        f"{row['layout']}, arm {row['arm']}, {row['pass']}": row for row in measured.pop("rows")
    }
    return {**found, **measured}


def observe_python_api(checkout: Checkout) -> dict[str, Any]:
    """Return names, signatures and results of the documented Python API."""
    ended = checkout.run_python(str(API_PROGRAM))
    if ended.returncode:
        return {"failures": [ended.stderr[-1000:]]}
    return json.loads(ended.stdout.splitlines()[-1])


def _said(checkout: Checkout, *arguments: str) -> str:
    ended = checkout.run(*arguments)
    return f"exit code {ended.returncode}\n{checkout.stable(ended.stdout)}"


def _without(tree: Any, names: tuple[str, ...]) -> Any:
    """``tree`` without the entries of these names, at any depth."""
    if isinstance(tree, dict):
        return {key: _without(value, names) for key, value in tree.items() if key not in names}
    return [_without(item, names) for item in tree] if isinstance(tree, list) else tree


def _with_failures(found: dict[str, Any], has_failed: bool, why: str) -> dict[str, Any]:
    return {**found, "failures": [why]} if has_failed else found
