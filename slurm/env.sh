# shellcheck shell=bash
# The environment of a training job, each variable with its reason. Sourced by launchers/slurm.sh
# after the site profile; what is already set stays.

# How ranks are started: srun, one task per GPU, because signals and exit codes then reach ranks and
# nobody has to meet beforehand; or torchrun, one task per node.
export VQMOE_LAUNCHER=${VQMOE_LAUNCHER:-srun}
# none | pyxis | apptainer | docker, the image, and what to mount beside the repository and the
# working directory: paths separated by spaces, the same inside and outside.
export VQMOE_CONTAINER=${VQMOE_CONTAINER:-none}
export VQMOE_IMAGE=${VQMOE_IMAGE:-}
export VQMOE_MOUNTS=${VQMOE_MOUNTS:-}
# 1: ranks of a few seconds compare nodes and try the network before training starts.
export VQMOE_PREFLIGHT=${VQMOE_PREFLIGHT:-1}
# How often one job may be started again, and how many attempts in a row may begin at the same
# iteration (node failures before the first checkpoint).
export VQMOE_MAX_RESTARTS=${VQMOE_MAX_RESTARTS:-50}
export VQMOE_MAX_IDLE_ATTEMPTS=${VQMOE_MAX_IDLE_ATTEMPTS:-3}

# Since Slurm 22.05 srun no longer takes over sbatch's --cpus-per-task: ranks would share one core.
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then
    export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
fi
# srun takes sbatch's --export for its own: after --export=NONE nothing that is set here, PATH included,
# would reach a rank.
unset SLURM_EXPORT_ENV SRUN_EXPORT_ENV
# The same for a job's GPUs in all, more than a step on one node can have, and for tasks per GPU, which
# srun refuses beside the tasks per node that every step is given.
unset SLURM_GPUS SLURM_NTASKS_PER_GPU
# Of a world that the job was submitted from; ranks would believe them before Slurm's.
unset RANK LOCAL_RANK WORLD_SIZE TORCHELASTIC_USE_AGENT_STORE
# torch would start a thread per core in every rank.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# In a container the user's own ~/.local packages, another torch perhaps, would stand before the image's.
if [[ "${VQMOE_CONTAINER:-none}" != none ]]; then export PYTHONNOUSERSITE=1; fi
# Rank logs are files: without it the last lines of a killed rank are lost.
export PYTHONUNBUFFERED=1
# A rank that dies in C++ shows its Python stack.
export PYTHONFAULTHANDLER=1
# Before Blackwell one hardware queue keeps Megatron's order of communication and GEMM; needed for
# overlap with TP > 1.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# A collective that fails or times out ends its rank instead of hanging until the time limit.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# Warnings name the interface or the link that failed; INFO is too much for every run.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Ever-changing row counts fragment the CUDA allocator's fixed segments.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# Compiled kernels: thousands of ranks in one home directory over NFS stall each other.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton_cache_$(id -u)}
