"""The machine's load as metrics: real samples, their mean once, and nothing that can hurt a run."""

import time

import psutil

from vqmoe_megatron.metrics.table import check_metric_names
from vqmoe_megatron.track.system_metrics import SystemMetrics


def wait_for_samples(sampler):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if found := sampler.take():
            return found
        time.sleep(0.02)
    raise AssertionError("no sample in 20 s")


def test_samples_are_this_machines_and_taken_once():
    sampler = SystemMetrics(print, interval_s=0.05)
    try:
        found = wait_for_samples(sampler)
    finally:
        sampler.close()
    check_metric_names(found)
    assert 0 <= found["system/cpu_utilization_percentage"] <= 100
    assert 0 < found["system/memory_used_bytes"] < psutil.virtual_memory().total
    sampler.take()
    assert sampler.take() == {}


def test_the_mean_is_over_all_samples_since_the_last_call(monkeypatch):
    calls = []

    def load():
        calls.append(10.0 * len(calls))
        return calls[-1]

    monkeypatch.setattr(psutil, "cpu_percent", load)
    sampler = SystemMetrics(print, interval_s=0.01)
    deadline = time.monotonic() + 20
    while len(calls) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    sampler.close()
    samples = calls[1:]  # the first call only starts the interval
    assert sampler.take()["system/cpu_utilization_percentage"] == sum(samples) / len(samples)


def test_a_machine_that_cannot_be_measured_is_reported_once(monkeypatch):
    def broken():
        raise OSError("no /proc here")

    said = []
    monkeypatch.setattr(psutil, "virtual_memory", broken)
    sampler = SystemMetrics(said.append, interval_s=0.01)
    sampler._thread.join(timeout=20)
    assert said == ["system metrics end here: OSError: no /proc here"]
    assert sampler.take() == {}
    sampler.close()
