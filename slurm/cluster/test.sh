#!/usr/bin/env bash
# Run tests/cluster on a virtual cluster that exists for them only.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: slurm/cluster/test.sh PYTHON [pytest argument ...]

Installs the Debian packages, starts four virtual nodes, runs pytest tests/cluster, stops them.
`make test-cluster` calls it. Without root or without packages it prints why and ends with 0.

example
  slurm/cluster/test.sh .venv/bin/python -k slurmd
HELP
}

if [[ $# -eq 0 || "$1" == "-h" || "$1" == "--help" ]]; then
    usage
    [[ $# -gt 0 ]] && exit 0 || exit 2
fi
python=$1
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if [[ $(id -u) -ne 0 ]]; then
    echo "test-cluster: SKIPPED, nothing was tested: slurmd and the image build need root"
    exit 0
fi
if ! command -v apt-get >/dev/null && ! command -v slurmctld >/dev/null; then
    echo "test-cluster: SKIPPED, nothing was tested: no Slurm here, and no apt-get to install it"
    exit 0
fi
if ! "$here/install.sh"; then
    echo "test-cluster: SKIPPED, nothing was tested: the packages could not be installed (see above)"
    exit 0
fi

# Short, because Slurm makes Unix sockets below it; and nobody else's.
VQMOE_CLUSTER_DIR=$(mktemp -d /tmp/vqmoe_cluster.XXXXXX)
export VQMOE_CLUSTER_DIR VQMOE_NODE_GPUS=2 VQMOE_TEST_CLUSTER=$VQMOE_CLUSTER_DIR
export VQMOE_CLUSTER_PORT=${VQMOE_CLUSTER_PORT:-17500} # not where a cluster of the user's listens
end() {
    local code=$?
    "$here/down.sh" >/dev/null # the last line stays pytest's
    if ((code == 0)); then rm -rf "$VQMOE_CLUSTER_DIR"; fi
    exit "$code"
}
trap end EXIT
line=$("$here/up.sh" 4 | tail -n1)
export SLURM_CONF=${line#export SLURM_CONF=}
# The image test's layers: overlay needs a third of the time and disk of vfs, where it can be mounted.
probe=$VQMOE_CLUSTER_DIR/overlay
mkdir -p "$probe"/{lower,upper,work,merged}
STORAGE_DRIVER=${STORAGE_DRIVER:-vfs}
if mount -t overlay -o "lowerdir=$probe/lower,upperdir=$probe/upper,workdir=$probe/work" \
    overlay "$probe/merged" 2>/dev/null; then
    umount "$probe/merged"
    STORAGE_DRIVER=overlay
fi
export STORAGE_DRIVER
echo "test-cluster: images are built with the storage driver $STORAGE_DRIVER"
# Unset: what belongs to a job around this one must not reach the jobs that are tested.
for name in $(compgen -e | grep -E '^(SLURM_|SBATCH_|MASTER_)'); do
    [[ "$name" == SLURM_CONF ]] || unset "$name"
done
"$python" -m pytest "$here/../../tests/cluster" "$@"
