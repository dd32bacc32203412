r"""Install the package's dependencies into the image's virtual environment; keep the base's torch.

    python install_dependencies.py setup.cfg constraints.txt [--torch-index-url URL] \
        [--also REQUIREMENT]

Runs inside the image build, with the environment's interpreter, before the sources are copied, so
that this layer is built again only when setup.cfg changes.

1. torch: what the base image brings stays. A base without torch gets the version of setup.cfg.
2. The torch now installed is written as an exact pip constraint.
3. All other dependencies are installed under that constraint.
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

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_FIND_TORCH = """
import importlib.metadata, importlib.util, json
spec = importlib.util.find_spec("torch")
print(json.dumps(spec and [importlib.metadata.version("torch"), spec.origin]))
"""


def read_requirements(setup_cfg: Path) -> tuple[str, list[str]]:
    """Return (the torch requirement, all other requirements) of ``setup.cfg``.

    Raises ``ValueError`` unless torch is required exactly once, with one exact version.
    """
    parser = configparser.ConfigParser()
    parser.read_string(setup_cfg.read_text(encoding="utf-8"))
    lines = [line.strip() for line in parser["options"]["install_requires"].splitlines()]
    wanted = [line for line in lines if line and not line.startswith("#")]
    torch = [line for line in wanted if _NAME.match(line)[0].lower() == "torch"]
    if len(torch) != 1 or not torch[0].startswith("torch=="):
        raise ValueError(
            f"{setup_cfg} must require torch once, as torch==VERSION; it has {torch or 'no torch'}"
        )
    return torch[0], [line for line in wanted if line != torch[0]]


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
        if found[0].split("+")[0] != torch_requirement.partition("==")[2]:
            print(
                f"WARNING: the package is tested with {torch_requirement}; this image has "
                f"{found[0]}. Choose a base image with that torch where there is one.",
                flush=True,
            )
    options.constraints.write_text(f"torch=={found[0]}\n", encoding="utf-8")
    pip_install("--constraint", str(options.constraints), *others, *options.also)
    after = find_torch()
    if after != found:
        sys.exit(f"pip replaced torch: it was {found}, it is {after}")


if __name__ == "__main__":
    main()
