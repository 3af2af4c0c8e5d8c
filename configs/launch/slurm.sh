#!/bin/bash
# One task a GPU, requeued after preemption: sbatch --nodes 1 configs/launch/slurm.sh configs/flux-fast-8xh100.yaml run.dir=runs/flux
#
# CONTAINER=/images/fastgrpo.sqsh   the tasks run in it (pyxis), with this folder; MOUNTS=/data:/data adds others
# REWARDS=serve.yaml                 `fastgrpo serve-rewards` runs beside the job, on its first node; REMOTE="0 1" are the
#                                    rewards of the config that ask it (by index; 0 if it is not set)
# NCCL_SOCKET_IFNAME, NCCL_IB_HCA    the network and adapters that NCCL takes, where it takes the wrong ones; NCCL_DEBUG=INFO
#                                    says which. docs/troubleshooting.md has what to do when ranks never meet.
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
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Since Slurm 22.05 srun no longer takes the job's --cpus-per-task: without it each task has one core.
step=(srun)
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
  step+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
fi
if [ -n "${CONTAINER:-}" ]; then
  step+=("--container-image=$CONTAINER" "--container-mounts=$PWD:$PWD${MOUNTS:+,$MOUNTS}" "--container-workdir=$PWD")
fi

# The reward server shares the first GPU of the first node; its rewards can have `offload`, or a node of their own.
remote=()
if [ -n "${REWARDS:-}" ]; then
  export FASTGRPO_REWARD_TOKEN=${FASTGRPO_REWARD_TOKEN:-$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')}
  port=${REWARD_PORT:-8917}
  # It outlives the warning that makes the ranks write a checkpoint: their last iteration is scored.
  "${step[@]}" --overlap --nodes=1 --ntasks=1 "--nodelist=$MASTER_ADDR" bash -c \
    'trap "" USR1; exec "${PYTHON:-python}" -m fastgrpo serve-rewards "$@"' \
    server "$REWARDS" serve.host=0.0.0.0 "serve.port=$port" &
  server=$!
  trap 'kill "$server" 2>/dev/null' EXIT
  # It answers once its modules are imported; weights load when a reward first scores.
  for _ in $(seq 600); do
    (exec 3<>"/dev/tcp/$MASTER_ADDR/$port") 2>/dev/null && break
    kill -0 "$server" 2>/dev/null || { echo "slurm.sh: the reward server ended: see above" >&2; exit 2; }
    sleep 1
  done
  for index in ${REMOTE:-0}; do
    remote+=("rewards.$index.options.url=http://$MASTER_ADDR:$port")
  done
fi

# A rank that fails ends the others; the step's exit code is the largest of its ranks'.
# Slurm says `8(x4)` for four nodes of eight tasks.
"${step[@]}" --kill-on-bad-exit=1 bash -c \
  'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; tasks=${SLURM_STEP_TASKS_PER_NODE:-$WORLD_SIZE}
  export LOCAL_WORLD_SIZE=${tasks%%[(,]*}; exec "${PYTHON:-python}" -m fastgrpo train "$@"' \
  rank "$@" "${remote[@]}" run.resume=auto
status=$?

# 75: stopped by a signal, with a checkpoint.
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
