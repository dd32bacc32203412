"""Commands in the documents and recipes exist: subcommand, options, scripts and recipe files."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from vqmoe_megatron import cli
from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.plan.layout import check_layout, minimum_world_size

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "docs" / "operations.md",
    ROOT / "docs" / "recipes.md",
    *sorted((ROOT / "recipes").rglob("*.yaml")),
]
COMMAND = re.compile(r"(?:^|[`(\s])(vqmoe [a-z][^`\n]*)")
SCRIPT = re.compile(r"(?<![\w/.$*-])((?:slurm|launchers|docker|recipes)/[\w/.-]+\.\w+)")
NAMES = {path: path.relative_to(ROOT).as_posix() for path in DOCUMENTS}


def commands(text: str) -> list[str]:
    """Every ``vqmoe ...`` in code: indented, fenced, quoted or behind a recipe's #."""
    text = text.replace("\\\n#", " ").replace("\\\n", " ")
    return [found.strip() for found in COMMAND.findall(text)]


def problem(line: str) -> str:
    """Say what of ``vqmoe ...`` does not exist; empty when all does."""
    words = shlex.split(re.split(r"&&|\||;| \(| #", line)[0], posix=False)[1:]
    command = typer.main.get_command(cli.app)
    while words and hasattr(command, "commands"):
        if words[0] not in command.commands:
            return f"no command {words[0]!r} in '{line}'"
        command = command.commands[words.pop(0)]
    options = {name for parameter in command.params for name in parameter.opts}
    words = words[: words.index("--")] if "--" in words else words
    given = [word.split("=")[0] for word in words if word.startswith("--")]
    unknown = [name for name in given if name not in options | {"--help"}]
    return f"no option {unknown[0]} in '{line}'" if unknown else ""


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES.values())
def test_every_command_exists(path: Path) -> None:
    found = commands(path.read_text("utf-8"))
    assert [text for line in found if (text := problem(line))] == []


def test_the_documents_are_read() -> None:
    found = commands((ROOT / "docs" / "operations.md").read_text("utf-8"))
    assert {line.split()[1] for line in found} >= {
        *("prepare", "pretrain", "plan", "preflight", "study", "mlflow-sync", "checkpoint")
    }


def test_what_does_not_exist_is_seen() -> None:
    assert "no command" in problem("vqmoe train recipes/quickstart.yaml")
    assert "no option --worldsize" in problem("vqmoe plan recipes/quickstart.yaml --worldsize 8")
    assert problem("vqmoe study submit STUDY.yaml --dry-run -- --time=4:00:00") == ""


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES.values())
def test_every_named_file_exists(path: Path) -> None:
    named = set(SCRIPT.findall(path.read_text("utf-8")))
    missing = {name for name in named if not (ROOT / name).is_file()}
    assert missing <= {"slurm/sites/NAME.sh", "docker/.env"}


def readme_programs() -> tuple[str, str]:
    """The README's program, and the same with the lines that it shows for a code memory."""
    text = (ROOT / "README.md").read_text("utf-8")
    program, with_memory = re.findall(r"```python\n(.*?)```", text, re.S)
    lines = re.search(r"^spec = .*\nmodel = .*\n", program, re.MULTILINE)
    return program, program.replace(lines[0], with_memory)


@pytest.mark.parametrize("program", readme_programs(), ids=["paper", "memory"])
def test_the_readme_s_program_learns_its_text(program: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    losses = [float(line.split()[1]) for line in run.stdout.splitlines()]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 1.0


# A command that starts ranks, on one line: what precedes the recipe says how many.
STARTS = re.compile(
    r"(sbatch|submit\.sh|torchrun\.sh|vqmoe pretrain)"
    r"(?:[^\n]*slurm/pretrain\.sbatch)? (recipes/[\w/]+\.yaml)([^\n`#)]*)"
)
SIZES = {"-N": "nodes", "--ntasks-per-node": "ranks", "NNODES": "nodes", "--nproc": "ranks"}
SIZES["NPROC_PER_NODE"] = "ranks"


def started(text: str) -> list[tuple[int | None, str, list[str]]]:
    """Every command that starts ranks: their number where given, the recipe, its overrides."""
    text = re.sub(r"\\\n[#\s]*", " ", text)
    found = []
    for match in STARTS.finditer(text):
        line = text[text.rfind("\n", 0, match.start()) + 1 : match.end()]
        sizes: dict[str, int] = {}
        for name, size in re.findall(r"(-N|--?\w[\w-]*|[A-Z_]+)[ =](\d+)\b", line):
            if name in SIZES:
                sizes[SIZES[name]] = int(size)
        overrides = re.findall(r"(?<!\S)[a-z_]+\.[a-z_]+=[^\s\"$]+(?!\S)", match[3])
        num_ranks = sizes.get("nodes", 1) * sizes.get("ranks", 1) if sizes else None
        found.append((num_ranks, match[2], overrides))
    return found


def shown_starts() -> list[tuple[str, int | None, str, list[str]]]:
    """The same of documents, recipes and the help texts of scripts."""
    scripts = [
        path
        for folder in ("slurm", "launchers")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".md", ".sh", ".sbatch")
    ]
    return [
        (path.relative_to(ROOT).as_posix(), *one)
        for path in (*DOCUMENTS, *scripts)
        for one in started(path.read_text("utf-8"))
    ]


def test_every_shown_start_fits_its_ranks() -> None:
    starts = shown_starts()
    assert len(starts) > 30
    for where, num_ranks, recipe, overrides in starts:
        config = load_recipe(ROOT / recipe, overrides)
        config.model.vocab_size = config.model.vocab_size or 256
        try:
            check_layout(config, num_ranks or minimum_world_size(config))
        except ValueError as error:
            pytest.fail(f"{where}: {recipe} {' '.join(overrides)} on {num_ranks} ranks: {error}")


def test_the_ranks_of_a_shown_start_are_read() -> None:
    job = (
        "  sbatch -N 2 --ntasks-per-node=8 \\\n      slurm/pretrain.sbatch recipes/a.yaml model.x=3"
    )
    assert started(job) == [(16, "recipes/a.yaml", ["model.x=3"])]
    torchrun = "NPROC_PER_NODE=8 NNODES=2 NODE_RANK=1 launchers/torchrun.sh recipes/a.yaml"
    assert started(torchrun) == [(16, "recipes/a.yaml", [])]
    assert started("vqmoe pretrain recipes/a.yaml --nproc 4 a.b=c") == [
        (4, "recipes/a.yaml", ["a.b=c"])
    ]
