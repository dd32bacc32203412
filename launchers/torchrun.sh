#!/usr/bin/env bash
# Train a recipe on one or more nodes with torchrun; start this once on every node.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: launchers/torchrun.sh RECIPE [key=value ...]

Starts `vqmoe pretrain RECIPE` on every rank of this node through torchrun.

environment
  NPROC_PER_NODE  ranks on this node                                 (default 1)
  NNODES          number of nodes                                    (default 1)
  NODE_RANK       this node's number, 0 .. NNODES-1                  (needed if NNODES > 1)
  MASTER_ADDR     host of node 0, reachable from every node          (needed if NNODES > 1)
  MASTER_PORT     a free port on that host, the same on every node   (default 29500)
  JOB_ID          any name, the same on every node                   (default $SLURM_JOB_ID, else vqmoe)
  PYTHON          interpreter (default: .venv/bin/python of this repository, else python3)

example: eight ranks on one node
  NPROC_PER_NODE=8 launchers/torchrun.sh recipes/quickstart.yaml parallel.expert_model_parallel_size=8

example: two nodes, on the second one
  NPROC_PER_NODE=8 NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 launchers/torchrun.sh recipes/quickstart.yaml

torchrun exits with 1 even after a clean stop on a signal: read `state` in the run directory's
status.json (completed, requeue, failed), never the exit code.
HELP
}

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    usage
    exit 0
fi
if (( $# < 1 )); then
    usage >&2
    exit 2
fi

recipe=$1
shift
if [[ ! -f "$recipe" ]]; then
    echo "torchrun.sh: no recipe at '$recipe' (from $PWD)" >&2
    exit 2
fi

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launchers/meeting_host.sh
source "$repository/launchers/meeting_host.sh"
nnodes=${NNODES:-1}
nproc_per_node=${NPROC_PER_NODE:-1}
if [[ "$nnodes" == 1 ]]; then
    node_rank=${NODE_RANK:-0}
    master_addr=$(plain_host "${MASTER_ADDR:-127.0.0.1}")
elif [[ -n "${NODE_RANK:-}" && -n "${MASTER_ADDR:-}" ]]; then
    node_rank=$NODE_RANK
    master_addr=$(plain_host "$MASTER_ADDR")
    # torchrun would wait for minutes. Its own check of an address takes no zone.
    if [[ "$master_addr" == *%* ]] || ! resolves "$master_addr"; then
        echo "torchrun.sh: MASTER_ADDR=$MASTER_ADDR is no host that this machine knows (or an IPv6" \
            "address with a zone); give the name or the address of node 0, without a port" >&2
        exit 2
    fi
else
    # A guessed address would give every node a world of its own and a silent hang.
    echo "torchrun.sh: NNODES=$nnodes needs NODE_RANK and MASTER_ADDR (the host of node 0)" >&2
    exit 2
fi

python=${PYTHON:-$repository/.venv/bin/python}
if [[ -z "${PYTHON:-}" && ! -x "$python" ]]; then
    python=python3
    echo "torchrun.sh: no .venv in $repository (make setup creates it); using $(command -v python3)" >&2
fi

# Handed to the ranks, which save and stop; 600 s is the time they have for it. Under nohup bash finds
# HUP ignored, and so it stays.
signals=SIGTERM,SIGINT,SIGUSR1
[[ -n "$(trap -p HUP)" ]] || signals+=,SIGHUP
exec "$python" -m torch.distributed.run \
    --nnodes="$nnodes" --nproc-per-node="$nproc_per_node" --node-rank="$node_rank" \
    --master-addr="$master_addr" --master-port="${MASTER_PORT:-29500}" \
    --rdzv-id="${JOB_ID:-${SLURM_JOB_ID:-vqmoe}}" \
    --signals-to-handle="$signals" --shutdown-timeout=600 --max-restarts=0 \
    -m vqmoe_megatron.cli pretrain "$recipe" "$@"
