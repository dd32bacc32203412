"""An error ends one thing, not the part."""

from __future__ import annotations

from pathlib import Path

from vqmoe_megatron.gpu_proof.attempt import attempt
from vqmoe_megatron.gpu_proof.part import Job


def test_an_error_is_a_failed_check_with_its_place(tmp_path: Path) -> None:
    job = Job("kernels", "cpu", True, 100.0, tmp_path, tmp_path)
    with attempt(job, "a"):
        job.check("inside", True)
    with attempt(job, "b"):
        raise KeyError("first line\nsecond line")
    inside, failed = job.findings.checks
    assert inside["passed"] and inside["name"] == "inside"
    assert (failed["name"], failed["passed"]) == ("b", False)
    assert failed["text"].startswith("KeyError: 'first line")
    assert "test_attempt.py:" in failed["text"]
