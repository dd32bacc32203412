"""A running virtual cluster, a small real corpus, and this folder on the path for ``slurm_job``.

These tests submit real jobs. Without the cluster of ``slurm/cluster/up.sh`` they skip: another
cluster is somebody's, and not to be filled with tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

HOW = "make test-cluster makes one of its own"
NUM_NODES = 4


@pytest.fixture(autouse=True, scope="session")
def only_on_request() -> None:
    """They take minutes, root and Debian packages, so installed tools alone do not start them."""
    if "VQMOE_TEST_CLUSTER" not in os.environ:
        pytest.skip("for make test-cluster, which sets VQMOE_TEST_CLUSTER")


@pytest.fixture(scope="session")
def cluster(only_on_request) -> None:
    """Skip unless SLURM_CONF names a cluster that was made for tests: they kill its daemons."""
    if shutil.which("sbatch") is None:
        pytest.skip(f"Slurm is not installed: {HOW}")
    if "SLURM_CONF" not in os.environ:
        pytest.skip(f"no virtual cluster is up: {HOW}")
    if str(Path(os.environ["SLURM_CONF"]).parent) != os.environ.get("VQMOE_TEST_CLUSTER"):
        pytest.skip(f"SLURM_CONF={os.environ['SLURM_CONF']} is not a cluster for tests: {HOW}")
    answer = subprocess.run(["sinfo", "-h", "-N", "-o", "%N"], capture_output=True, text=True)
    assert answer.returncode == 0, f"slurmctld does not answer: {answer.stderr}"
    assert len(set(answer.stdout.split())) >= NUM_NODES, f"too few nodes: {answer.stdout}"


@pytest.fixture(scope="session")
def job_folder(cluster, tmp_path_factory) -> Path:
    """Where jobs are submitted and leave their logs and runs."""
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="session")
def job_corpus(cluster, tmp_path_factory) -> Path:
    """About 160 kB of the interpreter's own library as a byte corpus."""
    from vqmoe_megatron.data.prepare import prepare_corpus

    out = tmp_path_factory.mktemp("cluster") / "corpus"
    source = Path(sysconfig.get_path("stdlib")) / "argparse.py"
    prepare_corpus("text", out, [source, source.with_name("typing.py")], "byte", None, False, False)
    return out


@pytest.fixture(scope="session")
def empty_store(cluster, tmp_path_factory) -> Path:
    """An MLflow database without runs, to be copied: making one takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "empty.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path
