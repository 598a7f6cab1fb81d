#!/bin/bash
# Train examples/multihost.py under Slurm, with one process and one worker for each GPU.
#
# Submit it from the repository's root. Options after the file go to the program:
#
#     sbatch examples/launch/slurm.sh
#     sbatch --nodes=4 examples/launch/slurm.sh --steps 1000
#
# srun starts the processes. jax.distributed.initialize() finds the other processes, and the GPU of
# its own process, in variables that srun sets: SLURM_JOB_ID, SLURM_STEP_NODELIST, SLURM_NTASKS,
# SLURM_PROCID and SLURM_LOCALID. Process 0 listens on the first node, on a port that follows from
# the job's number. JAX_COORDINATOR_PORT sets another port.
#
# Two minutes before the time limit Slurm sends SIGTERM. The processes then save the same step and
# end with exit code 143. The job queues again, and continues from the checkpoint. After an error,
# `scontrol requeue JOB` continues the job from its last checkpoint.
#
# Change: the numbers of nodes and GPUs, the time limit, other options that your cluster asks for,
# such as --partition and --account, and the line that activates the environment. All nodes must
# share the folder from which you submit, because it holds the environment and the checkpoints.
#
# One process for each GPU: --ntasks-per-node equals --gpus-per-node. Do not use --gpus-per-task,
# which may hide a node's other GPUs: JAX picks the GPU by the process's number on its node.

#SBATCH --job-name=signax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=signax-%j.log

# source .venv/bin/activate

# srun does not inherit --cpus-per-task. An error in one process ends all processes.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    python examples/multihost.py --checkpoint="signax-$SLURM_JOB_ID" "$@"
code=$?

# scancel ends this script before it gets here.
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
