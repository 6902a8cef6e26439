#!/bin/bash
# Several nodes with Slurm: one torchrun a node, which find each other by a rendezvous.
#
#     sbatch docs/slurm.sh --model runs/sft --data pairs.jsonl --out runs/dpo
#
# Flags go to train_dpo.py. Everything that a run reads and writes must lie where all nodes see it under the
# same path: this project with its environment, the model, the data, --out, and the cache of tokenised data.
# The script is handed in again when a node fails or time runs out, and goes on from the newest checkpoint.

#SBATCH --job-name=minidpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1          # one torchrun; it starts a rank for each card
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0                      # all of a node's memory: each rank reads the whole model before it splits it
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300          # five minutes before the end, to this script

set -u
export MINIDPO_CACHE="${MINIDPO_CACHE:-$PWD/runs/cache}"
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))
# Any free port of the first node; jobs that share a node must not share it.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# No --max-restarts: agents on several nodes may count restarts differently. A rank that dies ends the step, and
# Slurm starts all of it anew.
srun --kill-on-bad-exit=1 python -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    train_dpo.py --shard --save-every 200 --resume "$@" &
step=$!

# SIGTERM: every rank saves after the step that is under way and leaves; then the job goes back into the queue.
trap 'kill -TERM "$step"; wait "$step"; scontrol requeue "$SLURM_JOB_ID"; exit 0' TERM
wait "$step"
