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
  NPROC_PER_NODE=8 launchers/torchrun.sh recipes/scale/small_64.yaml

example: two nodes, on the second one
  NPROC_PER_NODE=8 NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 \
      launchers/torchrun.sh recipes/scale/billion_64.yaml

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
if [[ ! -f "$recipe" ]]; then # a pipe could be read by one rank only
    echo "torchrun.sh: no recipe file at '$recipe' (from $PWD)" >&2
    exit 2
fi

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launchers/meeting_host.sh
source "$repository/launchers/meeting_host.sh"
nnodes=${NNODES:-1}
nproc_per_node=${NPROC_PER_NODE:-1}
master_port=${MASTER_PORT:-29500}
# number NAME VALUE LEAST MOST: torchrun's own answer would be a traceback.
number() {
    if [[ ! "$2" =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3 || 10#$2 > $4)); then
        echo "torchrun.sh: $1='$2' is no whole number from $3 to $4" >&2
        exit 2
    fi
}
number NNODES "$nnodes" 1 131072
[[ "$nproc_per_node" =~ ^(auto|cpu|gpu)$ ]] || number NPROC_PER_NODE "$nproc_per_node" 1 131072
number MASTER_PORT "$master_port" 1 65535
if ((nnodes > 1)) && [[ -z "${NODE_RANK:-}" || -z "${MASTER_ADDR:-}" ]]; then
    # A guessed address would give every node a world of its own and a silent hang.
    echo "torchrun.sh: NNODES=$nnodes needs NODE_RANK and MASTER_ADDR (the host of node 0)" >&2
    exit 2
fi
node_rank=${NODE_RANK:-0}
number NODE_RANK "$node_rank" 0 $((nnodes - 1))
master_addr=$(plain_host "${MASTER_ADDR:-127.0.0.1}")
# torchrun would wait for minutes. Its own check of an address takes no zone.
if [[ "$master_addr" == *%* ]] || ! resolves "$master_addr"; then
    echo "torchrun.sh: MASTER_ADDR=$master_addr is no host that this machine knows (or an IPv6" \
        "address with a zone); give the name or the address of node 0, without a port" >&2
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
    --master-addr="$master_addr" --master-port="$master_port" \
    --rdzv-id="${JOB_ID:-${SLURM_JOB_ID:-vqmoe}}" \
    --signals-to-handle="$signals" --shutdown-timeout=600 --max-restarts=0 \
    -m vqmoe_megatron.cli pretrain "$recipe" "$@"
