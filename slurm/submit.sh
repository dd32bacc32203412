#!/usr/bin/env bash
# sbatch, after the checks that Slurm leaves out: nothing is submitted that must fail at once.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: slurm/submit.sh [sbatch options] slurm/pretrain.sbatch|slurm/study.sbatch ARGUMENT...

Makes logs/slurm in the current folder (without it a job fails and says nothing), refuses a recipe
that is not there and tasks per node that are not the GPUs per node, tells the job where the
repository is (VQMOE_ROOT), then calls sbatch with the same arguments.

example
  slurm/submit.sh -N 2 --gpus-per-node=8 --ntasks-per-node=8 slurm/pretrain.sbatch \
      recipes/scale/billion_64.yaml
HELP
}

refuse() {
    echo "submit.sh: $*; nothing was submitted" >&2
    exit 2
}

# gpus_of_gres LIST ELSE: 8 of "tmpfs:100,gpu:h100:8(S:0-1)"; ELSE where it names no GPU.
gpus_of_gres() {
    local entry sum=0
    for entry in ${1//,/ }; do
        entry=${entry%%(*}
        [[ "$entry" != gpu ]] || entry=gpu:1
        [[ ! "$entry" =~ ^gpu:(.*:)?([0-9]+)$ ]] || sum=$((sum + BASH_REMATCH[2]))
    done
    if ((sum)); then echo "$sum"; else echo "$2"; fi
}

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    usage
    exit 0
fi

tasks="" total="" gpus="" script="" file="" previous=""
for argument in "$@"; do
    if [[ -n "$script" ]]; then
        file=$argument
        break
    fi
    # The value of an option that stands alone; a job may be called what its script is called.
    case "$previous" in
        --ntasks-per-node | --gpus-per-node | --gres) argument=$previous=$argument ;;
        -J | --job-name | -o | --output | -e | --error | -i | --input) argument=--text=$argument ;;
    esac
    case "$argument" in
        --ntasks-per-node=*) tasks=${argument#*=} ;;
        -n* | --ntasks | --ntasks=*) total=given ;; # the job itself divides and checks
        --gpus-per-node=*) gpus=${argument##*[=:]} ;;
        --gres=*) gpus=$(gpus_of_gres "${argument#*=}" "$gpus") ;;
        -*) ;;
        *.sbatch) script=$argument ;;
    esac
    previous=$argument
done

[[ -n "$script" ]] || { usage >&2 && exit 2; }
[[ -f "$script" ]] || refuse "no job script at '$script' (from $PWD)"
if [[ "$script" != *mlflow.sbatch ]]; then # its argument is a folder to be made
    [[ -n "$file" ]] || refuse "$(basename "$script") needs a YAML file"
    [[ -f "$file" ]] || refuse "no file '$file' (from $PWD)"
fi
tasks=${tasks:-${total:-1}}
if [[ "$gpus" =~ ^[0-9]+$ && "${VQMOE_LAUNCHER:-srun}" == srun && "$tasks" != given &&
    "$gpus" != "$tasks" ]]; then
    refuse "tasks per node = GPUs per node fails: $tasks != $gpus; --ntasks-per-node=$gpus," \
        "or VQMOE_LAUNCHER=torchrun with one task per node"
fi
command -v sbatch >/dev/null || refuse "no sbatch here; slurm/cluster/up.sh starts a Slurm to try"
[[ "$PWD" != *%* ]] || refuse "the path of the current folder, $PWD, has a %, which Slurm replaces" \
    "in the names of logs; submit from another folder"
# A job's variables are not another job's: submitted from inside one, sbatch would hand them on.
for name in $(compgen -e SLURM_); do
    [[ "$name" == SLURM_CONF || "$name" == SLURM_CLUSTERS ]] || unset "$name"
done
mkdir -p logs/slurm
root=$(cd "$(dirname "$script")/.." && pwd)
[[ ! -f "$root/launchers/slurm.sh" ]] || export VQMOE_ROOT=${VQMOE_ROOT:-$root}
exec sbatch "$@"
