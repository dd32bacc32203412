"""What a GPU machine without a network lacks: ``python -m vqmoe_megatron.gpu_proof.wheels``.

The machine has Python 3.12, torch, triton, numpy, scipy, safetensors, sentencepiece, transformers,
typer, pytest, psutil, rich and matplotlib, and no network. ``WHEELS`` names the rest of what the
package imports, without what those names need besides: each is listed itself. Downloaded where
there is a network, they are installed there with ``pip install --no-index --no-deps --target``.

``wheels.json`` beside them holds their checksums, and the commit they were made at.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from vqmoe_megatron.gpu_proof.card import source_facts
from vqmoe_megatron.rundir.atomic import replace_file

# The one list. antlr4 is a source distribution, of pure Python: its wheel is built here.
WHEELS = (
    "megatron-core==0.16.1",
    "omegaconf==2.3.0",
    "PyYAML==6.0.3",
    "tenacity==9.1.2",
)
BUILT_WHEELS = ("antlr4-python3-runtime==4.9.3",)
PYTHON_VERSION = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MOST_BYTES = 64 * 2**20
MANIFEST = "wheels.json"
EXIT_DONE, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def download_wheels(out: Path) -> dict[str, Any]:
    """Fetch ``WHEELS`` into a new or empty folder; return the manifest that is written there.

    What an earlier download left in the folder is replaced.

    Raises:
        ValueError: for a folder that holds something else, or more than 64 MiB in all.
        subprocess.CalledProcessError: when pip fails; it has said why.
    """
    out.mkdir(parents=True, exist_ok=True)
    present = {path.name: path for path in out.iterdir()}
    if present:
        ours = {MANIFEST, *read_manifest(out)["sha256"]}
        for name in sorted(set(present) - ours):
            raise ValueError(f"{out} holds {name}, which is not ours; give a new or empty folder")
    for path in present.values():
        path.unlink()
    pip = [sys.executable, "-m", "pip"]
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    target = ["--python-version", PYTHON_VERSION, "--implementation", "cp", *platforms]
    subprocess.run(
        [*pip, "download", "-q", "--no-deps", "--only-binary=:all:", *target, "-d", str(out)]
        + list(WHEELS),
        check=True,
    )
    for requirement in BUILT_WHEELS:
        subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(out), requirement], check=True)
    wheels = sorted(out.glob("*.whl"))
    impure = [path.name for path in wheels if not _fits(path.name)]
    if impure:
        raise ValueError(f"{impure[0]} does not run on Python {PYTHON_VERSION}, x86-64 Linux")
    num_bytes = sum(path.stat().st_size for path in wheels)
    if num_bytes > MOST_BYTES:
        raise ValueError(f"the wheels have {num_bytes:,} bytes, more than {MOST_BYTES:,}")
    manifest = {
        "python": PYTHON_VERSION,
        "source": source_facts(),
        "sha256": {path.name: _sha256(path) for path in wheels},
    }
    replace_file(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder of wheels, each compared with its checksum.

    Raises:
        ValueError: when it is missing, a wheel is missing or differs, or is not listed.
    """
    path = folder / MANIFEST
    advice = "make it anew with python -m vqmoe_megatron.gpu_proof.wheels --out DIR"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        listed = dict(manifest["sha256"])
        manifest["source"]["sha256"]
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {MANIFEST}; {advice}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); {advice}") from None
    present = {wheel.name for wheel in folder.glob("*.whl")}
    for name in sorted(present ^ set(listed)):
        raise ValueError(f"{folder}: {name} is there or listed, but not both; {advice}")
    for name, digest in listed.items():
        if _sha256(folder / name) != digest:
            raise ValueError(f"{folder / name} differs from its checksum; {advice}")
    return manifest


def install_wheels(folder: Path, target: Path) -> None:
    """Install all of a folder's wheels into a new folder ``target``, without any network.

    Raises:
        ValueError: when pip refuses; with what it said.
    """
    wheels = [str(path) for path in sorted(folder.glob("*.whl"))]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    command += ["--no-compile", "--disable-pip-version-check", "--target", str(target)]
    done = subprocess.run([*command, *wheels], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"pip could not install the wheels of {folder}:\n{done.stderr.strip()}")


def _fits(name: str) -> bool:
    tags = name.removesuffix(".whl").split("-")[-3:]
    is_pure = tags[1:] == ["none", "any"] and tags[0].startswith("py")
    return is_pure or (tags[0] == "cp312" and tags[2].endswith("x86_64"))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    """Read the command line and download; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vqmoe_megatron.gpu_proof.wheels", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder")
    out = parser.parse_args().out
    try:
        manifest = download_wheels(out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except subprocess.CalledProcessError as error:
        print(f"error: pip ended with {error.returncode}", file=sys.stderr)
        return EXIT_FAILED
    for name, digest in manifest["sha256"].items():
        print(f"{name}  sha256 {digest[:16]}  {(out / name).stat().st_size:,} bytes")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
