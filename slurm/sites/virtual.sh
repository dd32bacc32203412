# shellcheck shell=bash
# The virtual cluster of slurm/cluster/up.sh: CPU nodes that are all this machine.
# Chosen by itself there, because the cluster's name is "virtual".

# Every node is the loopback; gloo would otherwise look the host name up.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
# The nodes claim more cores than there are.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# GPUs of the machine, if any, belong to no virtual node.
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-}
