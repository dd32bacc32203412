#!/usr/bin/env bash
# Start a real Slurm of N virtual nodes on this machine: munged, slurmctld, one slurmd per node.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: slurm/cluster/up.sh [N]

Starts N virtual nodes n1 .. nN (default 4). Started again, it starts what does not run, for
instance a slurmd that was killed. The last line of its output is the line to use.

example
  eval "$(slurm/cluster/up.sh 4 | tail -n1)"
  sinfo
  sbatch -N 4 slurm/pretrain.sbatch recipes/parity.yaml parallel.expert_model_parallel_size=4
  slurm/cluster/down.sh

environment
  VQMOE_CLUSTER_DIR   state folder (default $TMPDIR/vqmoe_slurm_cluster); keep the path short
  VQMOE_CLUSTER_PORT  slurmctld's port; node i listens on the i-th after it (default 17000)
  VQMOE_NODE_CPUS     CPUs each node claims to have, whatever the machine has (default 8)
  VQMOE_NODE_GPUS     GPUs each node claims to have; there are none (default 0)
HELP
}

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    usage
    exit 0
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=slurm/cluster/place.sh
source "$here/place.sh"
# shellcheck source=slurm/cluster/slurm_conf.sh
source "$here/slurm_conf.sh"

num_nodes=${1:-4}
[[ "$num_nodes" =~ ^[1-9][0-9]?$ ]] || refuse "N must be 1 to 99, not '$num_nodes'"
require_root
require_own_folder
require_commands munged slurmctld slurmd sinfo
# A slurmstepd makes a Unix socket below the folder; such a path has at most 107 characters.
((${#cluster_dir} <= 70)) || refuse "VQMOE_CLUSTER_DIR=$cluster_dir is longer than 70 characters"

# shellcheck disable=SC2174  # only the last folder needs the mode
mkdir -p -m 755 "$cluster_dir" "$cluster_dir/state" "$cluster_dir/log"
wanted=$(slurm_conf "$num_nodes" "${VQMOE_NODE_CPUS:-8}" "${VQMOE_NODE_GPUS:-0}" \
    "${VQMOE_CLUSTER_PORT:-17000}")
if is_alive "$cluster_dir/slurmctld.pid" slurmctld; then
    [[ "$wanted" == "$(<"$conf")" ]] ||
        refuse "$cluster_dir holds a running cluster of another shape; slurm/cluster/down.sh first"
fi
echo "$wanted" >"$conf"
for ((gpu = 0; gpu < ${VQMOE_NODE_GPUS:-0}; gpu++)); do # Slurm looks whether a device is there
    : >"$cluster_dir/gpu$gpu"
done
((${VQMOE_NODE_GPUS:-0} == 0)) ||
    echo "Name=gpu File=$cluster_dir/gpu[0-$((VQMOE_NODE_GPUS - 1))]" >"$cluster_dir/gres.conf"

if ! is_alive "$cluster_dir/munged.pid" munged; then
    [[ -s "$cluster_dir/munge.key" ]] ||
        (umask 077 && head -c 128 /dev/urandom >"$cluster_dir/munge.key")
    munged --force --key-file="$cluster_dir/munge.key" --socket="$munge_socket" \
        --pid-file="$cluster_dir/munged.pid" --log-file="$cluster_dir/log/munged.log" \
        --seed-file="$cluster_dir/munged.seed" 2>>"$cluster_dir/log/munged.log" ||
        refuse "munged did not start; see $cluster_dir/log/munged.log"
fi
export SLURM_CONF=$conf
if ! is_alive "$cluster_dir/slurmctld.pid" slurmctld; then
    slurmctld -f "$conf" || refuse "slurmctld did not start; see $cluster_dir/log/slurmctld.log"
fi
for ((node = 1; node <= num_nodes; node++)); do
    is_alive "$cluster_dir/slurmd_n$node.pid" slurmd || slurmd -N "n$node" -f "$conf" ||
        refuse "slurmd of n$node did not start; see $cluster_dir/log/slurmd_n$node.log"
done

all_are_up() {
    (($(sinfo -h -N -t idle,alloc,mix,comp -o %N 2>/dev/null | sort -u | wc -l) == num_nodes))
}
wait_until 60 all_are_up ||
    refuse "nodes did not come up: $(sinfo -h -N -o '%N %T' | tr '\n' ' '); see $cluster_dir/log"
echo "$num_nodes virtual nodes are up; state and logs in $cluster_dir" >&2
echo "export SLURM_CONF=$conf"
