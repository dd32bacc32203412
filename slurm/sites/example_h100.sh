# shellcheck shell=bash
# Example of a GPU site: copy it to slurm/sites/<name>.sh and adapt. It is used by jobs on a Slurm
# cluster of that name (scontrol show config, ClusterName), or with VQMOE_SITE=<name>.
#
#   sbatch -N 8 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=12 \
#       slurm/pretrain.sbatch recipes/scale/multi_billion_64.yaml

# Containers: the image lies on the shared file system; code, working directory and these are
# mounted at the same paths inside.
export VQMOE_CONTAINER=${VQMOE_CONTAINER:-pyxis}
export VQMOE_IMAGE=${VQMOE_IMAGE:-/shared/images/vqmoe.sqsh}
export VQMOE_MOUNTS=${VQMOE_MOUNTS:-/shared/data /shared/runs}

# The Ethernet that NCCL and gloo bootstrap over; the InfiniBand adapters for the data. Only the
# site knows their names: ip -brief address, ibstat -l.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-eth0}
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-eth0}
export NCCL_IB_HCA=${NCCL_IB_HCA:-mlx5}
