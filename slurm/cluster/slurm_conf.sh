# shellcheck shell=bash
# Prints the slurm.conf of the virtual cluster. Sourced by up.sh.

# slurm_conf NUM_NODES CPUS_PER_NODE GPUS_PER_NODE FIRST_PORT
slurm_conf() {
    local num_nodes=$1 cpus=$2 gpus=$3 port=$4 host gres=""
    : "${cluster_dir:?}" "${munge_socket:?}" "${marker:?}" # of place.sh
    host=$(hostname -s)
    if ((gpus)); then gres="Gres=gpu:$gpus"; fi
    cat <<CONF
$marker: $num_nodes virtual nodes, one slurmd each, on one machine.
ClusterName=virtual
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root

# A munged of its own: nothing of the machine's is used or changed. A requeued job waits until the
# credentials of its last attempt have expired, 120 s unless told.
AuthType=auth/munge
AuthInfo=socket=$munge_socket,cred_expire=15
CredType=cred/munge
StateSaveLocation=$cluster_dir/state
SlurmdSpoolDir=$cluster_dir/spool_%n
SlurmctldPidFile=$cluster_dir/slurmctld.pid
SlurmdPidFile=$cluster_dir/slurmd_%n.pid
SlurmctldLogFile=$cluster_dir/log/slurmctld.log
SlurmdLogFile=$cluster_dir/log/slurmd_%n.log

# No cgroups: processes are found by their parents, and the nodes' sizes are believed.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
PropagateResourceLimits=NONE

# Short times: a node is dead 20 s after its slurmd, a job has 10 s between TERM and KILL. Ended
# jobs are remembered for an hour, a node that comes back is used again.
JobRequeue=1
ReturnToService=2
SlurmdTimeout=20
SlurmctldTimeout=20
KillWait=10
MessageTimeout=15
InactiveLimit=0
MinJobAge=3600
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5,sched_min_interval=500000

$( ((gpus)) && echo "GresTypes=gpu")
NodeName=n[1-$num_nodes] NodeAddr=127.0.0.1 NodeHostname=$host \
 Port=[$((port + 1))-$((port + num_nodes))] CPUs=$cpus RealMemory=4000 $gres
PartitionName=virtual Nodes=n[1-$num_nodes] Default=YES MaxTime=INFINITE State=UP
CONF
}
