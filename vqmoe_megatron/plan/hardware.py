"""Hardware profiles for predicted step times: every figure an assumption with its source.

No figure was measured by this project. Peaks are vendors' data sheets, dense, without sparsity;
what a program reaches of them (``achievable_*``) and latencies are round planning figures. Link
bandwidths are per GPU and direction, as the alpha-beta model needs them: half of what a data sheet
calls bidirectional.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

GB = 10**9
GIB = 2**30
TERA = 10**12


@dataclass(frozen=True)
class Link:
    """Time of n bytes in s sequential messages: ``s * alpha + n / beta``."""

    alpha_seconds: float
    bytes_per_second: float  # of one GPU, one direction, before the achievable share


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device in nodes of equal size."""

    name: str
    bf16_flops_per_second: float
    fp32_flops_per_second: float
    memory_bytes: int
    memory_bytes_per_second: float
    devices_per_node: int = 8
    intra_node: Link
    inter_node: Link
    achievable_flops: float = 0.4  # share of the peak that large matrix products reach
    achievable_memory: float = 0.8
    achievable_link: float = 0.8
    kernels: str = "fused"  # of activation_memory: local | fused
    sources: dict[str, str]  # by field name

    def __post_init__(self) -> None:
        unsourced = {f.name for f in fields(self)} - {"name", "sources"} - set(self.sources)
        if unsourced:
            raise ValueError(f"hardware {self.name}: no source for {', '.join(sorted(unsourced))}")

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        return "cpu" if self.name == "CPU" else "cuda"

    def peak_flops_per_second(self, is_bf16: bool) -> float:
        """By the data sheet."""
        return self.bf16_flops_per_second if is_bf16 else self.fp32_flops_per_second

    def flops_per_second(self, is_bf16: bool) -> float:
        """What matrix products are taken to reach."""
        return self.peak_flops_per_second(is_bf16) * self.achievable_flops


ASSUMED = "planning assumption, not measured"
_COMMON = {
    "achievable_flops": f"{ASSUMED}: 0.4 of the dense peak for transformer training",
    "achievable_memory": f"{ASSUMED}: 0.8 of the data sheet",
    "achievable_link": f"{ASSUMED}: 0.8 of the data sheet",
    "kernels": "Transformer Engine on CUDA",
    "devices_per_node": "HGX baseboard with 8 GPUs",
}
_HOPPER = {
    **_COMMON,
    "bf16_flops_per_second": "NVIDIA H100/H200 SXM data sheet: 1,979 TFLOP/s with sparsity, half "
    "of it dense",
    "fp32_flops_per_second": "NVIDIA H100/H200 SXM data sheet: 67 TFLOP/s (TF32 is not assumed)",
    "intra_node": "NVLink 4, data sheet: 900 GB/s bidirectional, 450 GB/s each way; alpha 5 us: "
    + ASSUMED,
    "inter_node": "one 400 Gb/s InfiniBand NDR port per GPU, 50 GB/s; alpha 10 us: " + ASSUMED,
}
_NVLINK4, _NDR = Link(5e-6, 450 * GB), Link(10e-6, 50 * GB)

_H100 = Hardware(
    name="H100",
    bf16_flops_per_second=989.4 * TERA,
    fp32_flops_per_second=66.9 * TERA,
    memory_bytes=80 * GB,
    memory_bytes_per_second=3350 * GB,
    intra_node=_NVLINK4,
    inter_node=_NDR,
    sources={
        **_HOPPER,
        "memory_bytes": "NVIDIA H100 SXM data sheet: 80 GB HBM3",
        "memory_bytes_per_second": "NVIDIA H100 SXM data sheet: 3.35 TB/s",
    },
)

PROFILES = {
    "H100": _H100,
    "H200": replace(
        _H100,
        name="H200",
        memory_bytes=141 * GB,
        memory_bytes_per_second=4800 * GB,
        sources={
            **_HOPPER,
            "memory_bytes": "NVIDIA H200 SXM data sheet: 141 GB HBM3e",
            "memory_bytes_per_second": "NVIDIA H200 SXM data sheet: 4.8 TB/s",
        },
    ),
    "B200": Hardware(
        name="B200",
        bf16_flops_per_second=2250 * TERA,
        fp32_flops_per_second=80 * TERA,
        memory_bytes=180 * GB,
        memory_bytes_per_second=8000 * GB,
        intra_node=Link(5e-6, 900 * GB),
        inter_node=_NDR,
        sources={
            **_COMMON,
            "bf16_flops_per_second": "NVIDIA Blackwell brief, HGX B200 at 1,000 W: 2,250 TFLOP/s "
            "dense",
            "fp32_flops_per_second": "NVIDIA Blackwell brief, HGX B200: 80 TFLOP/s",
            "memory_bytes": "HGX B200: 180 GB HBM3e usable of 192 GB",
            "memory_bytes_per_second": "NVIDIA HGX B200 data sheet: 8 TB/s at most",
            "intra_node": "NVLink 5, data sheet: 1.8 TB/s bidirectional, 900 GB/s each way; alpha "
            "5 us: " + ASSUMED,
            "inter_node": _HOPPER["inter_node"],
        },
    ),
    "CPU": Hardware(
        name="CPU",
        bf16_flops_per_second=50e9,
        fp32_flops_per_second=50e9,
        memory_bytes=4 * GIB,
        memory_bytes_per_second=10 * GB,
        intra_node=Link(100e-6, 1 * GB),
        inter_node=Link(200e-6, 1.25 * GB),
        achievable_flops=0.5,
        kernels="local",
        sources={
            "bf16_flops_per_second": "one core without bf16 instructions computes in fp32; "
            + ASSUMED,
            "fp32_flops_per_second": "one core, two 8-wide fused multiply-adds at 3 GHz is 96, "
            "half of it assumed; " + ASSUMED,
            "memory_bytes": "one rank's share of a workstation; " + ASSUMED,
            "memory_bytes_per_second": "one core's share of a memory channel; " + ASSUMED,
            "devices_per_node": "one rank per core, 8 cores; " + ASSUMED,
            "intra_node": "gloo over loopback; " + ASSUMED,
            "inter_node": "10 Gb/s Ethernet; " + ASSUMED,
            "achievable_flops": ASSUMED,
            "achievable_memory": ASSUMED,
            "achievable_link": ASSUMED,
            "kernels": "Megatron-core's own modules on the CPU",
        },
    ),
}


def hardware_profile(name: str) -> Hardware:
    """Return the profile of that name, in any case.

    Raises:
        ValueError: with the known names.
    """
    for known, profile in PROFILES.items():
        if known.lower() == name.lower():
            return profile
    raise ValueError(f"hardware {name!r} is not known; choose one of {', '.join(PROFILES)}")
