"""What this environment offers and which path each part will take, with the reason.

Looks without touching: no process group is started, nothing is patched, megatron-core and DeepSpeed
are not imported (their versions come from package metadata). No communication.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vqmoe_megatron.config.not_offered import FP16_REFUSED
from vqmoe_megatron.runtime.fused_parts import (
    folder_without_code,
    import_problem,
    part_findings,
    place_of,
)
from vqmoe_megatron.runtime.optional_packages import OPTIONAL_PACKAGES, missing
from vqmoe_megatron.runtime.versions import (
    MEGATRON_CORE,
    TORCH,
    Supported,
    is_supported,
    supported_version,
)
from vqmoe_megatron.runtime.world import discover_rank

Finding = tuple[str, str, str]  # part, path taken, reason

APEX_KERNELS = ("amp_C", "fused_layer_norm_cuda")
GIB = 2**30


def doctor_report(environment: Mapping[str, str] | None = None) -> list[Finding]:
    """Return (part, path taken, reason) for every part that chooses its path by what is installed.

    ``environment`` replaces the process's variables in rank discovery. Raises nothing of its own.
    """
    environment = os.environ if environment is None else environment
    return [
        ("python", platform.python_version(), sys.executable),
        *_torch_findings(),
        version_finding(MEGATRON_CORE),
        _transformer_engine_finding(),
        apex_finding(),
        *part_findings("cuda" if torch.cuda.is_available() else "cpu"),
        (
            "precision",
            "fp32, bf16",
            f"fp16 is refused: {FP16_REFUSED}",
        ),
        _grouped_mm_finding(),
        _triton_finding(),
        *map(_optional_finding, OPTIONAL_PACKAGES),
        rank_discovery_finding(environment),
        *_machine_findings(environment),
    ]


def print_doctor() -> None:
    """Print the report as a table on standard output."""
    table = Table(title="vqmoe doctor", title_justify="left")
    for header in ("part", "path taken", "reason"):
        table.add_column(header, overflow="fold")
    for row in doctor_report():
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def rank_discovery_finding(environment: Mapping[str, str]) -> Finding:
    """Tell how a run started now would find its rank: torchrun, srun, or a single process."""
    try:
        found = discover_rank(environment)
    except ValueError as error:
        return ("rank discovery", "REFUSED", str(error))
    job = environment.get("SLURM_JOB_ID")
    where = f"rank {found.rank} of {found.world_size}, local rank {found.local_rank}"
    if job:
        step = environment.get("SLURM_STEP_ID")
        where += f"; Slurm job {job}, " + (f"step {step}" if step else "outside any srun step")
        where += f", nodes {environment.get('SLURM_JOB_NODELIST', 'unknown')}"
    return ("rank discovery", found.source, where)


def installed_version(package: str) -> str | None:
    """Return a distribution's version without importing it, ``None`` when not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def apex_finding() -> Finding:
    """Tell where Apex is, since its name also belongs to an unrelated package; what of it is used
    stands with the parts."""
    if importlib.util.find_spec("apex") is None:
        return ("apex", "not installed", "none of its parts can be used")
    if folder := folder_without_code("apex"):
        return (
            "apex",
            "not used",
            f"{folder} is a folder without code; nothing here takes notice, but `import apex` "
            "succeeds, so specs of Megatron-LM's own choose FusedLayerNorm and raise: remove it",
        )
    missing = [kernel for kernel in APEX_KERNELS if importlib.util.find_spec(kernel) is None]
    if missing:
        lacks = f"{place_of('apex')} lacks {', '.join(missing)}"
        return ("apex", "without kernels", f"{lacks} (PyPI's apex is an unrelated package)")
    version = installed_version("apex") or "of unknown version"
    return ("apex", version, f"{' and '.join(APEX_KERNELS)} found; {place_of('apex')}")


def _torch_findings() -> list[Finding]:
    backends = [
        name
        for name, is_available in (
            ("nccl", torch.distributed.is_nccl_available),
            ("gloo", torch.distributed.is_gloo_available),
        )
        if torch.distributed.is_available() and is_available()
    ]
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    devices: list[Finding] = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        memory = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
        devices.append(
            (f"device {index}", "cuda", f"{torch.cuda.get_device_name(index)}, {memory}")
        )
    backend = "nccl" if devices else "gloo"
    chosen = backend if backend in backends else "MISSING"
    reason = f"{backend} goes with the device; available: {', '.join(backends) or 'none'}"
    return [
        version_finding(TORCH, f"; {build}"),
        *(devices or [("device", "cpu", f"no CUDA device is visible; torch {build}")]),
        ("process groups", chosen, reason),
    ]


def version_finding(supported: Supported, more: str = "") -> Finding:
    """Tell whether the installed torch or megatron-core is in the supported range."""
    package, wanted = supported.package, supported.requirement
    version = supported_version(supported)
    if version is None:
        return (package, "MISSING", f"not installed; {wanted} is needed")
    if not is_supported(supported, version):
        return (package, version, f"OUTSIDE the supported {wanted}{more}")
    return (package, version, f"supported: {wanted}{more}")


def _transformer_engine_finding() -> Finding:
    """Try the import: installed is not enough, it loads CUDA libraries."""
    part, problem = "transformer engine", import_problem("transformer_engine.pytorch")
    version = installed_version("transformer_engine") or "of unknown version"
    if problem is None:
        return (part, version, f"imports; {place_of('transformer_engine')}")
    if importlib.util.find_spec("transformer_engine") is None:
        return (part, "not used", "not installed")
    return (part, "not used", f"{version}: {problem.reason}")


def _grouped_mm_finding() -> Finding:
    if hasattr(torch.nn.functional, "grouped_mm"):
        return ("grouped experts", "grouped_mm", "torch.nn.functional.grouped_mm is present")
    return (
        "grouped experts",
        "MISSING",
        f"torch {torch.__version__} has no grouped_mm; upgrade it",
    )


def _triton_finding() -> Finding:
    version = installed_version("triton")
    if version is None or importlib.util.find_spec("triton") is None:
        return ("triton", "not used", "not installed; torch code runs instead")
    if not torch.cuda.is_available():
        return ("triton", "not used", f"{version} installed, but its kernels need a GPU")
    return ("triton", version, "installed, and a GPU is visible")


def _optional_finding(package: str) -> Finding:
    problem, optional = missing(package), OPTIONAL_PACKAGES[package]
    if problem is not None:
        return (package, "not used", f"{problem}; {optional.without_it}")
    version = installed_version(optional.distribution)
    return (package, version or "of unknown version", optional.with_it)


def _machine_findings(environment: Mapping[str, str]) -> list[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = _cgroup_number("cpu.max")
    granted = f", cgroup grants {limit:g}" if limit else ""
    omp = environment.get("OMP_NUM_THREADS", "not set")
    cores = f"{usable} of {os.cpu_count()} cores usable{granted}; OMP_NUM_THREADS {omp}"
    disk = shutil.disk_usage(".")
    stats = os.statvfs(".")
    return [
        ("cpu", f"{torch.get_num_threads()} threads", cores),
        _memory_finding(),
        (
            "disk",
            f"{disk.free / GIB:.1f} GiB free",
            f"of {disk.total / GIB:.1f} GiB at {Path.cwd()}; {stats.f_favail:,} inodes free",
        ),
    ]


def _memory_finding() -> Finding:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return ("memory", "unknown", "no /proc/meminfo on this system")
    words = [line.split() for line in meminfo.read_text().splitlines()]
    sizes_bytes = {word[0].rstrip(":"): int(word[1]) * 1024 for word in words}
    limit_bytes = _cgroup_number("memory.max")
    granted = f", cgroup limit {limit_bytes / GIB:.1f} GiB" if limit_bytes else ""
    free, total = sizes_bytes["MemAvailable"] / GIB, sizes_bytes["MemTotal"] / GIB
    return ("memory", f"{free:.1f} GiB free", f"of {total:.1f} GiB{granted}")


def _cgroup_number(name: str) -> float | None:
    """Return a cgroup v2 limit (``cpu.max`` in cores, ``memory.max`` in bytes), ``None``: none."""
    path = Path("/sys/fs/cgroup") / name
    if not path.exists():
        return None
    fields = path.read_text().split()
    if fields[0] == "max":
        return None
    return int(fields[0]) / (int(fields[1]) if len(fields) > 1 else 1)
