#!/usr/bin/env bash
# Train a recipe on ranks of this machine.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: launchers/local.sh RECIPE NPROC [key=value ...]

Starts `vqmoe pretrain RECIPE --nproc NPROC` with the given overrides, from any folder.
Relative paths are taken from the current folder.

environment
  PYTHON   interpreter to use (default: .venv/bin/python of this repository, else python3)

example
  launchers/local.sh recipes/quickstart.yaml 2 train.train_iters=20 code_memory.max_order=5

exit codes: 0 done, 75 saved and wants to be continued, 2 usage or configuration, 1 crash
HELP
}

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    usage
    exit 0
fi
if (( $# < 2 )); then
    usage >&2
    exit 2
fi

recipe=$1
nproc=$2
shift 2

if [[ ! -e "$recipe" || -d "$recipe" ]]; then # a pipe is one
    echo "local.sh: no recipe at '$recipe' (from $PWD)" >&2
    exit 2
fi
if [[ ! "$nproc" =~ ^[1-9][0-9]*$ ]]; then
    echo "local.sh: NPROC must be a positive whole number, not '$nproc'" >&2
    exit 2
fi

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$repository/.venv/bin/python}
if [[ -z "${PYTHON:-}" && ! -x "$python" ]]; then
    python=python3
    echo "local.sh: no .venv in $repository (make setup creates it); using $(command -v python3)" >&2
fi

# exec: signals reach the command itself, and its exit code is ours.
exec "$python" -m vqmoe_megatron.cli pretrain "$recipe" --nproc "$nproc" "$@"
