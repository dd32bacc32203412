"""CPU, memory and GPUs of rank 0's node, sampled by a thread that training never waits for.

A thread of our own and not MLflow's: MLflow's sends to the server by itself, loses what it measured
during an outage, and keeps no file to replay. Here the means since the last log line become a
record of ``system_metrics.jsonl``; ``metrics.jsonl`` stays free of what two equal runs do not
share. GPUs are read through NVML; without NVIDIA's driver or the Python package ``nvidia-ml-py``
they are left out.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable

import psutil

SAMPLE_INTERVAL_S = 5.0


class SystemMetrics:
    """Samples every ``interval_s`` from construction until :meth:`close`."""

    def __init__(
        self, report: Callable[[str], None], interval_s: float = SAMPLE_INTERVAL_S
    ) -> None:
        self._report = report
        self._interval_s = interval_s
        self._samples: dict[str, list[float]] = defaultdict(list)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
        self._thread.start()

    def take(self) -> dict[str, float]:
        """Return the means since the last call, by metric name; empty when nothing was sampled."""
        with self._lock:
            samples, self._samples = self._samples, defaultdict(list)
        return {name: sum(values) / len(values) for name, values in samples.items()}

    def close(self) -> None:
        """End the thread; waits for at most one sample. May be called twice."""
        self._closing.set()
        self._thread.join(timeout=1.0)

    def _work(self) -> None:
        """Sample until closed; a machine that cannot be measured is reported once."""
        try:
            psutil.cpu_percent()  # the first call starts the interval the next one measures
            gpus = _Gpus()
            while not self._closing.wait(self._interval_s):
                memory = psutil.virtual_memory()
                sample = {
                    "system/cpu_utilization_percentage": psutil.cpu_percent(),
                    "system/memory_used_bytes": float(memory.total - memory.available),
                    **gpus.sample(),
                }
                with self._lock:
                    for name, value in sample.items():
                        self._samples[name].append(value)
        except Exception as error:  # a broken driver must not end training
            self._report(f"system metrics end here: {type(error).__name__}: {error}")


class _Gpus:
    """The node's GPUs through NVML; none where there is no driver or no Python package."""

    def __init__(self) -> None:
        self._handles = []
        try:
            import pynvml
        except ImportError:
            return
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return
        count = pynvml.nvmlDeviceGetCount()
        self._handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]

    def sample(self) -> dict[str, float]:
        """Return utilisation, memory and power now; what a GPU does not tell is left out."""
        if not self._handles:
            return {}
        nvml, found = self._nvml, {}
        readings = {
            "system/gpu_utilization_percentage": (
                lambda gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
                lambda values: sum(values) / len(values),
            ),
            "system/gpu_memory_used_bytes": (
                lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
                max,
            ),
            "system/gpu_power_watts": (lambda gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000, sum),
        }
        for name, (read, reduce) in readings.items():
            try:
                found[name] = float(reduce([read(gpu) for gpu in self._handles]))
            except nvml.NVMLError:  # not supported by this GPU, or not allowed in this container
                continue
        return found
