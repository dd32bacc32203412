"""Hardware profiles for predicted step times: every figure an assumption with its source.

No figure was measured by this project. Peaks are vendors' data sheets, dense, without sparsity.
Roofs are what large kernels were measured to reach of a unit, by others, or else a stated share of
the peak. Latencies are round planning figures. Link bandwidths are per GPU and direction, as the
alpha-beta model needs them: half of what a data sheet calls bidirectional.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

GB = 10**9
GIB = 2**30
TERA = 10**12
BF16_TENSOR_CORE, FP32_FMA, BANDWIDTH = "bf16_tensor_core", "fp32_fma", "bandwidth"
UNITS = (BF16_TENSOR_CORE, FP32_FMA, BANDWIDTH)  # that a kernel can be bound by


@dataclass(frozen=True)
class Link:
    """Time of n bytes in s sequential messages: ``s * alpha + n / beta``."""

    alpha_seconds: float
    bytes_per_second: float  # of one GPU, one direction, before the achievable share


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device in nodes of equal size."""

    name: str
    bf16_flops_per_second: float  # peak
    fp32_flops_per_second: float  # peak
    bf16_roof_flops_per_second: float  # of the tensor cores
    fp32_roof_flops_per_second: float  # of fused multiply-adds, outside the tensor cores
    memory_bytes: int
    memory_roof_bytes_per_second: float  # read and written, of a large copy
    launch_seconds: float  # from the end of a kernel to the start of the next
    devices_per_node: int = 8
    intra_node: Link
    inter_node: Link
    achievable_link: float = 0.8
    kernels: str = "fused"  # of activation_memory: local | cpu | fused
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

    def roof_flops_per_second(self, unit: str) -> float:
        """What kernels reach on ``bf16_tensor_core`` or ``fp32_fma``; on ``bandwidth`` no
        operation counts."""
        return {
            BF16_TENSOR_CORE: self.bf16_roof_flops_per_second,
            FP32_FMA: self.fp32_roof_flops_per_second,
        }[unit]


ASSUMED = "planning assumption, not measured"
_COMMON = {
    "launch_seconds": f"{ASSUMED}: 2 us between two kernels of a stream whose host runs ahead",
    "achievable_link": f"{ASSUMED}: 0.8 of the data sheet",
    "kernels": "Transformer Engine on CUDA",
    "devices_per_node": "HGX baseboard with 8 GPUs",
}
MEASURED = "measured on this card, not with this software"
_HOPPER = {
    **_COMMON,
    "bf16_flops_per_second": "NVIDIA H100/H200 SXM data sheet: 1,979 TFLOP/s with sparsity, half "
    "of it dense",
    "fp32_flops_per_second": "NVIDIA H100/H200 SXM data sheet: 67 TFLOP/s (TF32 is not assumed)",
    "fp32_roof_flops_per_second": f"{MEASURED}: about 60 TFLOP/s of fp32 FMA",
    "intra_node": "NVLink 4, data sheet: 900 GB/s bidirectional, 450 GB/s each way; alpha 5 us: "
    + ASSUMED,
    "inter_node": "one 400 Gb/s InfiniBand NDR port per GPU, 50 GB/s; alpha 10 us: " + ASSUMED,
}
_NVLINK4, _NDR = Link(5e-6, 450 * GB), Link(10e-6, 50 * GB)

_H100 = Hardware(
    name="H100",
    bf16_flops_per_second=989.4 * TERA,
    fp32_flops_per_second=66.9 * TERA,
    bf16_roof_flops_per_second=800 * TERA,
    fp32_roof_flops_per_second=60 * TERA,
    memory_bytes=80 * GB,
    memory_roof_bytes_per_second=3000 * GB,
    launch_seconds=2e-6,
    intra_node=_NVLINK4,
    inter_node=_NDR,
    sources={
        **_HOPPER,
        "bf16_roof_flops_per_second": f"{MEASURED}: about 800 TFLOP/s on large GEMMs",
        "memory_bytes": "NVIDIA H100 SXM data sheet: 80 GB HBM3",
        "memory_roof_bytes_per_second": f"{MEASURED}: copies about 3.0 TB/s (data sheet: 3.35)",
    },
)

PROFILES = {
    "H100": _H100,
    "H200": replace(
        _H100,
        name="H200",
        bf16_roof_flops_per_second=790 * TERA,
        memory_bytes=141 * GB,
        memory_roof_bytes_per_second=4300 * GB,
        sources={
            **_HOPPER,
            "bf16_roof_flops_per_second": f"{MEASURED}: about 790 TFLOP/s on large GEMMs",
            "memory_bytes": "NVIDIA H200 SXM data sheet: 141 GB HBM3e",
            "memory_roof_bytes_per_second": f"{MEASURED}: copies about 4.3 TB/s (data sheet: 4.8)",
        },
    ),
    "B200": Hardware(
        name="B200",
        bf16_flops_per_second=2250 * TERA,
        fp32_flops_per_second=80 * TERA,
        bf16_roof_flops_per_second=1800 * TERA,
        fp32_roof_flops_per_second=72 * TERA,
        memory_bytes=180 * GB,
        memory_roof_bytes_per_second=7200 * GB,
        launch_seconds=2e-6,
        intra_node=Link(5e-6, 900 * GB),
        inter_node=_NDR,
        sources={
            **_COMMON,
            "bf16_flops_per_second": "NVIDIA Blackwell brief, HGX B200 at 1,000 W: 2,250 TFLOP/s "
            "dense",
            "fp32_flops_per_second": "NVIDIA Blackwell brief, HGX B200: 80 TFLOP/s",
            "bf16_roof_flops_per_second": f"{ASSUMED}: 0.8 of the peak, as of an H100's",
            "fp32_roof_flops_per_second": f"{ASSUMED}: 0.9 of the peak, as of an H100's",
            "memory_bytes": "HGX B200: 180 GB HBM3e usable of 192 GB",
            "memory_roof_bytes_per_second": "NVIDIA HGX B200 data sheet: 8 TB/s at most; "
            f"{ASSUMED}: 0.9 of it, as of an H100's",
            "intra_node": "NVLink 5, data sheet: 1.8 TB/s bidirectional, 900 GB/s each way; alpha "
            "5 us: " + ASSUMED,
            "inter_node": _HOPPER["inter_node"],
        },
    ),
    "CPU": Hardware(
        name="CPU",
        bf16_flops_per_second=50e9,
        fp32_flops_per_second=50e9,
        bf16_roof_flops_per_second=25e9,
        fp32_roof_flops_per_second=25e9,
        memory_bytes=4 * GIB,
        memory_roof_bytes_per_second=8 * GB,
        launch_seconds=5e-6,
        intra_node=Link(100e-6, 1 * GB),
        inter_node=Link(200e-6, 1.25 * GB),
        kernels="cpu",
        sources={
            "bf16_flops_per_second": "one core without bf16 instructions computes in fp32; "
            + ASSUMED,
            "fp32_flops_per_second": "one core, two 8-wide fused multiply-adds at 3 GHz is 96, "
            "half of it assumed; " + ASSUMED,
            "bf16_roof_flops_per_second": "half of the peak; " + ASSUMED,
            "fp32_roof_flops_per_second": "half of the peak; " + ASSUMED,
            "memory_bytes": "one rank's share of a workstation; " + ASSUMED,
            "memory_roof_bytes_per_second": "one core's share of a memory channel; " + ASSUMED,
            "launch_seconds": "an operator of torch, 5 us; " + ASSUMED,
            "devices_per_node": "one rank per core, 8 cores; " + ASSUMED,
            "intra_node": "gloo over loopback; " + ASSUMED,
            "inter_node": "10 Gb/s Ethernet; " + ASSUMED,
            "achievable_link": ASSUMED,
            "kernels": "Megatron-core's own modules on the CPU, with torch's attention",
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
