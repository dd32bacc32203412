"""The shell commands of a page of documentation, and a folder in which all of them are run.

In a page a fence ``bash`` is to be typed, ``text`` is what the command before it prints, ``sh``
needs what a test cannot have, and ``yaml`` with a title is a file. Commands run as they stand, in
the order of the page, in one shell; only sizes and numbers of iterations are cut
(``short_vqmoe.py``), and what starts daemons, installs or submits is replaced by its harmless form
(``REPLACED``).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(
    r'^(?P<indent> *)```(?P<kind>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<body>.*?)^(?P=indent)```$',
    re.MULTILINE | re.DOTALL,
)
HAS_MLFLOW = f"""{sys.executable} -c 'import mlflow.version'"""
# What a page says -> what is run, and why not as it stands.
REPLACED: tuple[tuple[str, str, str], ...] = (
    (r"make ([\w-]+)(.*)", rf"make -C {ROOT} -n \1\2", "its set-up takes minutes and a network"),
    (r"source \.venv/bin/activate", "true", "the test's own environment is active"),
    (r"pip install .*", "true", "needs a network; make setup and make test-versions install"),
    (r"mlflow ui .*", HAS_MLFLOW, "a server that stays; tests/track starts servers"),
    (r"(?:sudo )?(slurm/cluster/\w+\.sh).*", r"\1 --help", "needs root: tests/cluster"),
    (r'eval "\$\((?:sudo )?(slurm/cluster/up\.sh) .*', r"\1 --help", "needs root: tests/cluster"),
    (r"(sinfo|squeue)", "true", "Slurm's own"),
    (r"(vqmoe study submit \S+(?: --max-parallel \d+)?)", r"\1 --dry-run", "tests/cluster submits"),
)
# Lengths of a titled study file, cut as short_vqmoe.py cuts those of a command.
CUT_IN_FILES = (
    (r"(\w+\.(?:train_iters|save_interval|log_interval|lr_warmup_iters)): (\d+)", 10),
    (r"(model\.seq_length): (\d+)", 4),
)


@dataclass
class Step:
    """One command, and the lines that the page shows of its output."""

    command: str
    shown: list[str] = field(default_factory=list)

    @property
    def is_refused(self) -> bool:
        """Whether the page shows a refusal: exit code 2."""
        return bool(self.shown) and self.shown[0].startswith("error:")


@dataclass
class Page:
    """What a page asks its reader to type, and to write into files."""

    steps: list[Step]
    files: dict[str, str]
    elsewhere: list[str]  # fences ``sh``


def read_page(text: str) -> Page:
    """The fences of a page in Markdown, in order."""
    page = Page([], {}, [])
    for fence in FENCE.finditer(text):
        lines = [line.removeprefix(fence["indent"]) for line in fence["body"].splitlines()]
        body = "\n".join(lines)
        if fence["kind"] == "bash":
            page.steps += [Step(command) for command in commands_of(body)]
        elif fence["kind"] == "text":
            page.steps[-1].shown += [line for line in lines if line.strip() not in ("", "...")]
        elif fence["kind"] == "sh":
            page.elsewhere += commands_of(body)
        elif fence["title"]:
            page.files[fence["title"]] = body + "\n"
    return page


def commands_of(body: str) -> list[str]:
    """Lines of shell with continued ones joined, without comments."""
    joined = re.sub(r"\\\n\s*", "", body)
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]


def harmless(command: str) -> str:
    """The command as it is run by a test."""
    for pattern, replacement, _ in REPLACED:
        if re.fullmatch(pattern, command):
            return re.sub(pattern, replacement, command)
    return command


def cut(text: str) -> str:
    """A study file with fewer and shorter steps."""
    for pattern, factor in CUT_IN_FILES:
        text = re.sub(pattern, lambda m, by=factor: f"{m[1]}: {max(1, int(m[2]) // by)}", text)
    return text


def make_folder(folder: Path, corpus: Path | None) -> None:
    """What stands in a checkout, ``vqmoe`` in ``bin``, and the library's corpus, if given."""
    for name in ("recipes", "slurm", "launchers", "README.md", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "data").mkdir()
    if corpus is not None:
        (folder / "data" / "stdlib").symlink_to(corpus)
    script = folder / "bin" / "vqmoe"
    script.parent.mkdir()
    short = Path(__file__).with_name("short_vqmoe.py")
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {short} "$@"\n')
    script.chmod(0o755)


def run_page(page: Page, folder: Path, timeout_seconds: float = 1800) -> list[tuple[int, str]]:
    """Run the page's commands in ``folder``; each one's exit code and output."""
    for name, text in page.files.items():
        (folder / name).write_text(cut(text))
    lines = []
    for number, step in enumerate(page.steps):
        lines.append(f"{{ {harmless(step.command)}\n}} >out_{number} 2>&1; echo $? >code_{number}")
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "300",
    }
    script = "\n".join(lines)
    subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, timeout=timeout_seconds, check=False
    )
    return [
        (int((folder / f"code_{n}").read_text()), (folder / f"out_{n}").read_text())
        for n in range(len(page.steps))
    ]


def without_numbers(line: str) -> str:
    """A line to compare: numbers are ``#``, white space and the lines of tables are single."""
    plain = re.sub(r"\d[\d,.:]*(?:e[+-]\d+)?", "#", line)
    return " ".join(re.sub(r"[│┃─━┏┓┗┛┡┩]", " ", plain).split())


def problems(page: Page, ended: list[tuple[int, str]]) -> list[str]:
    """Commands that ended otherwise than the page says, and lines that they did not print."""
    found = []
    for step, (code, output) in zip(page.steps, ended, strict=True):
        if code != (2 if step.is_refused else 0):
            found.append(f"{step.command}: exit code {code}\n{output[-3000:]}")
            continue
        printed = [without_numbers(line) for line in output.splitlines()]
        for line in map(without_numbers, step.shown):
            if not any(line in other for other in printed):
                found.append(f"{step.command}: never printed '{line}'\n{output[-3000:]}")
    return found
