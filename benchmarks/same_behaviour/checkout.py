"""One checkout as its users see it: the command ``vqmoe`` and the package, by ``PYTHONPATH``."""

from __future__ import annotations

import configparser
import hashlib
import os
import random
import re
import shutil
import subprocess
from functools import cached_property
from pathlib import Path

CODE = ("vqmoe_megatron", "recipes", "setup.cfg")  # what is run of a checkout
KEPT_VARIABLES = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")
FIXED_VARIABLES = {
    "OMP_NUM_THREADS": "1",  # sums in one order
    "CUDA_VISIBLE_DEVICES": "",
    "COLUMNS": "160",
    "TERM": "dumb",
    "LC_ALL": "C.UTF-8",
    "PYTHONWARNINGS": "ignore",  # of torch and megatron, with their paths
}
LASTING, WRITTEN = ("text.txt", "recipes", "corpus"), "written_"  # in the work folder
# What no two runs have in common, in what a command prints.
VOLATILE = (
    re.compile(r"(?<=tokens_per_second )\S+"),
    re.compile(r"(?<=step_time_ms )\S+"),
    re.compile(r"(?<=eta )\S+"),
    re.compile(r"\b\d+(\.\d+)?(?= MB/s)"),
    re.compile(r"\b\d+(\.\d+)?(?= s\b)"),
    re.compile(r"(?<=process )\d+"),
)
TEXT_SEED, NUM_SENTENCES = 1234, 6000
SECONDS_PER_COMMAND = 600


class CheckoutUnusable(Exception):
    """The folder is no checkout that can be run; the message says why."""


class Checkout:
    """A checkout, the interpreter it runs in, and a work folder that holds its runs.

    The work folder has ``text.txt``, a link ``recipes`` to the checkout's, and ``corpus``. Commands
    run in it with relative paths, so two checkouts print and record the same ones.
    """

    def __init__(self, path: Path, python: Path, work: Path) -> None:
        """Make the work folder.

        Raises:
            CheckoutUnusable: when ``path`` has no ``vqmoe`` entry point, or Python imports the
                package from elsewhere.
        """
        self.path, self.python, self.work = path.resolve(), python.absolute(), work
        self.work.mkdir(parents=True)
        (self.work / "text.txt").write_text(_sentences())
        (self.work / "recipes").symlink_to(self.path / "recipes")
        setup = configparser.ConfigParser()
        setup.read(self.path / "setup.cfg")
        scripts = setup.get("options.entry_points", "console_scripts", fallback="")
        if (found := re.search(r"^vqmoe *= *([\w.]+):(\w+)", scripts, re.MULTILINE)) is None:
            raise CheckoutUnusable(
                f"{self.path}/setup.cfg names no console script vqmoe; give the root of a checkout"
            )
        module, function = found.groups()
        self._vqmoe = (
            f"import sys; from {module} import {function} as main; sys.argv[0] = 'vqmoe'; "
            "sys.exit(main())"
        )
        imported = self.run_python("-c", "import vqmoe_megatron; print(vqmoe_megatron.__file__)")
        if not Path(imported.stdout.strip() or "/").is_relative_to(self.path):
            raise CheckoutUnusable(
                f"{self.python} with PYTHONPATH={self.path} imports vqmoe_megatron from "
                f"{imported.stdout.strip() or imported.stderr.strip()}"
            )

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment of every process: nothing of a job or a world around us."""
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        return {**kept, **FIXED_VARIABLES, "PYTHONPATH": str(self.path)}

    @cached_property
    def commit(self) -> str | None:
        """The commit that holds the ``CODE`` as it is here, or None where it was changed."""
        changed = self._git("status", "--porcelain", "--", *CODE)
        return self._git("rev-parse", "HEAD") if changed == "" else None

    @cached_property
    def code(self) -> str | None:
        """What git calls the ``CODE``, equal in commits that change other files; None: changed."""
        if self.commit is None:
            return None
        names = self._git("rev-parse", *(f"HEAD:{path}" for path in CODE))
        return hashlib.sha256((names or self.commit).encode()).hexdigest()[:12]

    @cached_property
    def corpus(self) -> str:
        """The prepared corpus, relative to the work folder; made when first asked for."""
        self.run("prepare", "text", "--input", "text.txt", "--out", "corpus")
        return "corpus"

    def tidy(self) -> None:
        """Remove what commands left in the work folder, except corpus and written checkpoints."""
        for path in self.work.iterdir():
            if path.name not in LASTING and not path.name.startswith(WRITTEN):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def command(self, *arguments: str) -> list[str]:
        """Return the command line of ``vqmoe ARGUMENTS``, as the installed script would run it."""
        return [str(self.python), "-c", self._vqmoe, *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``vqmoe ARGUMENTS`` to its end, output merged."""
        return self._run(self.command(*arguments), subprocess.STDOUT)

    def run_apart(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``vqmoe ARGUMENTS`` to its end, output and errors apart."""
        return self._run(self.command(*arguments), subprocess.PIPE)

    def run_python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``python ARGUMENTS`` to its end."""
        return self._run([str(self.python), *arguments], subprocess.PIPE)

    def stable(self, text: str) -> str:
        """``text`` without what differs between two runs of one checkout: places and times."""
        for place, name in ((self.work, "WORK"), (self.path, "CHECKOUT"), (self.python, "PYTHON")):
            text = text.replace(str(place), name)
        for pattern in VOLATILE:
            text = pattern.sub("TIME", text)
        return "\n".join(line.rstrip() for line in text.splitlines())

    def _git(self, *arguments: str) -> str | None:
        ended = subprocess.run(
            ["git", "-C", str(self.path), *arguments], capture_output=True, text=True
        )
        return ended.stdout.strip() if ended.returncode == 0 else None

    def _run(self, command: list[str], stderr: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.work,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            errors="replace",
            timeout=SECONDS_PER_COMMAND,
        )


def file_hash(file: Path) -> str:
    """SHA-256 of a file, the first 16 digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _sentences() -> str:
    """Return the same text on every machine: words of unequal frequency, about 240 kB."""
    source = random.Random(TEXT_SEED)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "er")]
    words = ["".join(source.choices(syllables, k=1 + rank % 3)) for rank in range(500)]
    weights = [1 / (1 + rank) for rank in range(len(words))]
    lines = (" ".join(source.choices(words, weights, k=8)) for _ in range(NUM_SENTENCES))
    return "".join(f"{line.capitalize()}.\n" for line in lines)
