#!/usr/bin/env bash
# One rank's process under srun or torchrun: what a stop request must not break on the way.
#
# 1. USR1, TERM and HUP reach every process of a step. They are blocked until the training process has
#    its handlers, so that one sent during the slow imports waits instead of killing it.
# 2. Exit code 75 (saved, start me again) becomes 0: srun --kill-on-bad-exit and torchrun would kill
#    rank 0 while it still writes its last lines. status.json says what happened.
set -euo pipefail

if [[ $# -eq 0 || "$1" == "-h" || "$1" == "--help" ]]; then
    echo "usage: launchers/rank.sh COMMAND [ARGUMENT ...]"
    echo "example: srun -n 4 launchers/rank.sh python -m vqmoe_megatron.cli pretrain recipes/parity.yaml"
    [[ $# -gt 0 ]] && exit 0 || exit 2
fi

trap : USR1 TERM INT HUP
export PET_NODE_RANK=${SLURM_NODEID:-0} # torchrun's --node-rank

block=(env --block-signal=USR1 --block-signal=TERM --block-signal=HUP)
if [[ "${VQMOE_KEEP_SIGNALS:-}" == 1 ]]; then
    block=()
elif ! "${block[@]}" true 2>/dev/null; then
    echo "rank.sh: this env cannot block signals; a stop request during start-up ends the rank" >&2
    block=()
fi

code=0
"${block[@]}" "$@" || code=$?
[[ $code -eq 75 ]] && exit 0
exit "$code"
