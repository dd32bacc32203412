r"""Install the package's dependencies into the image's virtual environment; keep the base's torch.

    python install_dependencies.py setup.cfg constraints.txt [--torch-index-url URL] \
        [--also REQUIREMENT]

Runs inside the image build, with the environment's interpreter, before the sources are copied, so
that this layer is built again only when setup.cfg changes.

1. torch: what the base image brings stays. A base without torch gets the newest that setup.cfg's
   extra ``torch`` allows.
2. The torch now installed is written as an exact pip constraint.
3. All dependencies, and those of the extra ``all``, are installed under that constraint.
4. torch must still be the same version at the same place; anything else fails the build.

Standard library only.
"""

from __future__ import annotations

import argparse
import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

_EXTRAS = re.compile(r"\w+\[(?P<names>[\w,]+)\]")
_FIND_TORCH = """
import importlib.metadata, importlib.util, json
spec = importlib.util.find_spec("torch")
print(json.dumps(spec and [importlib.metadata.version("torch"), spec.origin]))
"""


def read_requirements(setup_cfg: Path) -> tuple[str, list[str]]:
    """Return (the torch requirement, all other requirements, those of the extra ``all`` included).

    Raises ``ValueError`` unless torch is required once, by the extra ``torch`` alone.
    """
    parser = configparser.ConfigParser()
    parser.read_string(setup_cfg.read_text(encoding="utf-8"))
    extras = parser["options.extras_require"]
    torch, wanted = _lines(extras["torch"]), _lines(parser["options"]["install_requires"])
    for line in _lines(extras["all"]):  # this package with the extras that it names
        for name in _EXTRAS.fullmatch(line)["names"].split(","):
            wanted += _lines(extras[name])
    also = [line for line in wanted if re.match(r"torch\b(?!-)", line)]
    if len(torch) != 1 or also:
        raise ValueError(
            f"{setup_cfg} must require torch by its extra torch alone, once; it has {torch + also}"
        )
    return torch[0], wanted


def _lines(value: str) -> list[str]:
    lines = [line.strip() for line in value.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def find_torch() -> tuple[str, str] | None:
    """Return (version, file) of the torch that this interpreter would import, without importing it.

    Asked in a new process: this one's import caches are older than the installation.
    """
    answer = subprocess.run(
        [sys.executable, "-c", _FIND_TORCH], check=True, capture_output=True, text=True
    )
    found = json.loads(answer.stdout)
    return tuple(found) if found else None


def pip_install(*arguments: str) -> None:
    """Run this interpreter's ``pip install``; a failure ends the build with pip's exit code."""
    pip = [sys.executable, "-m", "pip", "install", "--progress-bar", "off"]
    done = subprocess.run([*pip, *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """Do the four steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("setup_cfg", type=Path)
    parser.add_argument("constraints", type=Path, help="file to write the torch constraint to")
    parser.add_argument("--torch-index-url", default="", help="empty: pip's own package index")
    parser.add_argument("--also", action="append", default=[], help="one more requirement")
    options = parser.parse_args()

    torch_requirement, others = read_requirements(options.setup_cfg)
    found = find_torch()
    if found is None:
        index = ["--index-url", options.torch_index_url] if options.torch_index_url else []
        pip_install(*index, torch_requirement)
        found = find_torch()
        if found is None:
            sys.exit(f"pip installed {torch_requirement}, yet torch cannot be found")
        print(f"torch {found[0]}: installed, the base image has none", flush=True)
    else:
        print(f"torch {found[0]}: the base image's, kept ({found[1]})", flush=True)
    options.constraints.write_text(f"torch=={found[0]}\n", encoding="utf-8")
    pip_install("--constraint", str(options.constraints), *others, *options.also)
    after = find_torch()
    if after != found:
        sys.exit(f"pip replaced torch: it was {found}, it is {after}")


if __name__ == "__main__":
    main()
