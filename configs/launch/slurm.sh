#!/bin/bash
# One task a GPU, requeued after preemption: sbatch --nodes 1 configs/launch/slurm.sh configs/flux-fast-8xh100.yaml run.dir=runs/flux
#SBATCH --job-name=fastgrpo
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the time limit, and where the partition preempts with it: every rank writes a checkpoint.
#SBATCH --signal=USR1@120
set -uo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT WORLD_SIZE=$SLURM_NTASKS

# A rank that fails ends the others; the step's exit code is the largest of its ranks'.
srun --kill-on-bad-exit=1 bash -c \
  'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "${PYTHON:-python}" -m fastgrpo train "$@"' \
  rank "$@" run.resume=auto
status=$?

# 75: stopped by a signal, with a checkpoint.
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
