"""Commands in the documents and recipes exist: subcommand, options, scripts and recipe files.

Those of the pages that the documentation site adds are run, too (``documented_pages``).
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from documented_pages import (
    REPLACED,
    Page,
    Step,
    commands_of,
    cut,
    harmless,
    make_folder,
    problems,
    read_page,
    run_page,
    without_numbers,
)
from short_vqmoe import shortened

from vqmoe_megatron import cli
from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.plan.layout import check_layout, minimum_world_size

ROOT = Path(__file__).resolve().parents[1]
PAGES = [  # of the documentation site, that tell their reader what to type
    *(ROOT / "docs" / f"{name}.md" for name in ("index", "quickstart", "troubleshooting")),
    *sorted((ROOT / "docs" / "tutorials").glob("*.md")),
    *sorted((ROOT / "docs" / "concepts").glob("*.md")),
]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "docs" / "operations.md",
    ROOT / "docs" / "recipes.md",
    *PAGES,
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
    texts = [
        (ROOT / "docs" / name).read_text("utf-8")
        for name in ("operations.md", "troubleshooting.md")
    ]
    found = commands("\n".join(texts))
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
        if not config.vision.is_on:
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


PAGE_NAMES = {page: page.relative_to(ROOT / "docs").as_posix() for page in PAGES}
# Fences `sh`: what a test cannot have, and what shows that it is right all the same.
ELSEWHERE = {
    "vqmoe checkpoint inspect RUN_DIR": "run in the quickstart, on a real directory",
    "vqmoe prepare images": "needs images; tests/data/test_image_sources.py makes some",
    "vqmoe prepare cifar10": "needs CIFAR-10; tests/data/test_image_sources.py writes its records",
    "torchrun ... pretrain_gpt.py": "needs Megatron-LM; tests/train/test_inside_megatron_lm.py",
}


def only_fast(*fast: str) -> list:
    """Parameters of all pages with commands; of the full tier those that train."""
    return [
        pytest.param(page, id=name, marks=() if name in fast else pytest.mark.full)
        for page, name in PAGE_NAMES.items()
        if read_page(page.read_text("utf-8")).steps
    ]


@pytest.mark.parametrize("path", only_fast("index.md", "concepts/code_memory.md"))
def test_every_command_of_a_page_runs_and_prints_what_the_page_shows(
    path: Path, tmp_path, request
) -> None:
    page = read_page(path.read_text("utf-8"))
    commands = [step.command for step in page.steps]
    prepares = any(one.endswith("--out data/stdlib") for one in commands)
    needs_text = not prepares and any("vqmoe p" in one for one in commands)
    corpus = request.getfixturevalue("stdlib_corpus") if needs_text else None
    folder = tmp_path / "checkout"
    folder.mkdir()
    make_folder(folder, corpus)
    assert problems(page, run_page(page, folder)) == []


def test_what_is_not_run_as_it_stands_is_known() -> None:
    pages = [read_page(path.read_text("utf-8")) for path in PAGES]
    found = [step.command for page in pages for step in page.steps]
    elsewhere = [command for page in pages for command in page.elsewhere]
    assert len(found) >= 40
    assert {start for start in ELSEWHERE for one in elsewhere if one.startswith(start)} == set(
        ELSEWHERE
    )
    assert all(any(one.startswith(start) for start in ELSEWHERE) for one in elsewhere)
    as_it_stands = [command for command in found if harmless(command) == command]
    assert len(as_it_stands) >= 25
    for pattern, _, reason in REPLACED:  # a line that serves nothing would hide what it once did
        assert any(re.fullmatch(pattern, command) for command in found), (pattern, reason)


def test_the_programs_of_the_tutorial_are_those_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    tutorial = (ROOT / "docs" / "tutorials" / "megatron_lm.md").read_text("utf-8")
    fences = [re.findall(r"```python\n(.*?)```", text, re.S) for text in (readme, tutorial)]
    assert fences[0] == fences[1] != []


def test_the_spec_of_the_tutorial_is_there() -> None:
    from megatron.core.transformer.spec_utils import import_module

    tutorial = (ROOT / "docs" / "tutorials" / "megatron_lm.md").read_text("utf-8")
    module, name = re.search(r"--spec (\S+) (\S+)", tutorial).groups()
    assert import_module([module, name]) is not None


def test_a_page_is_read_in_order() -> None:
    page = read_page(
        "```bash\nvqmoe a \\\n    b=1  # why\n# nothing\nls\n```\nThen\n"
        "```text\nerror: no\n...\n```\n"
        '1. x\n\n    ```yaml title="f.yaml"\n    train.train_iters: 40\n    ```\n'
        "```sh\nsrun x\n```\n"
    )
    assert page.steps == [Step("vqmoe a b=1"), Step("ls", ["error: no"])]
    assert [step.is_refused for step in page.steps] == [False, True]
    assert page.files == {"f.yaml": "train.train_iters: 40\n"}
    assert cut(page.files["f.yaml"]) == "train.train_iters: 4\n"
    assert page.elsewhere == ["srun x"] and commands_of("") == []


def test_what_a_page_claims_in_vain_is_seen() -> None:
    page = Page([Step("a", ["loss 1.5 | x"]), Step("b", ["error: c"]), Step("d")], {}, [])
    assert problems(page, [(0, "12: loss 2.25e-3 | x"), (2, "error: c of 3"), (0, "")]) == []
    assert len(problems(page, [(0, "loss 2.5 | y"), (0, "error: c"), (1, "")])) == 3
    assert without_numbers("┃ a  │ 1,024 ┃") == "a #"


def test_a_run_is_cut_and_stays_the_same_run() -> None:
    first = shortened(["pretrain", "r.yaml", "train.train_iters=60", "train.exit_interval=30"])
    second = shortened(["pretrain", "r.yaml", "train.train_iters=60", "model.seq_length=256"])
    assert "train.exit_interval=3" in first and "train.train_iters=6" in first
    assert [word for word in first if "exit" not in word] == second
    assert shortened(["plan", "r.yaml"]) == ["plan", "r.yaml"]
