"""One part in a process of its own: ``python -m vqmoe_megatron.gpu_proof.child PART ...``.

Started by ``proof.py`` alone. What the part says is in ``findings.json`` of its work folder; exit
code 1 when it raised.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import signal
import sys
import traceback
from pathlib import Path

from vqmoe_megatron.gpu_proof.card import machine_facts
from vqmoe_megatron.gpu_proof.part import PARTS, Job
from vqmoe_megatron.runtime.forked_children import PR_SET_PDEATHSIG
from vqmoe_megatron.runtime.third_party_noise import quiet_known_messages

EXIT_DONE, EXIT_FAILED = 0, 1


def main() -> int:
    """Run the part; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[part.name for part in PARTS])
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--fail", action="store_true")
    given = parser.parse_args()
    _end_with_parent()
    quiet_known_messages()
    job = Job(given.part, given.device, given.tiny, given.seconds, given.work, given.out)
    module = next(part.module for part in PARTS if part.name == given.part)
    try:
        job.findings.facts = machine_facts(given.device)
        if given.fail:
            raise RuntimeError(f"made to fail on purpose (--fail {given.part})")
        importlib.import_module(f"vqmoe_megatron.gpu_proof.{module}").run(job)
    except Exception as error:
        lines = traceback.format_exc().rstrip().splitlines()
        job.findings.error = [f"{type(error).__name__}: {' '.join(str(error).split())}", *lines]
        print("\n".join(lines), flush=True)
        return EXIT_FAILED
    finally:
        job.publish(at_once=True)
    return EXIT_DONE


def _end_with_parent() -> None:
    """Have the kernel end this process when the proof is killed."""
    if sys.platform.startswith("linux"):
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the call above
            sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a poisoned device may hang in the interpreter's orderly end
