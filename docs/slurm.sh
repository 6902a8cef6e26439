#!/bin/bash
# Several nodes with Slurm: one torchrun per node. They find each other by a rendezvous.
#
#     sbatch docs/slurm.sh --model runs/sft --data pairs.jsonl --out runs/dpo
#
# Flags go to train_dpo.py. This project, its environment, the model, the data and --out must be at the same path on all
# nodes. The cache of tokenised data may be local to each node. When a node fails, a rank dies or time runs out, the job
# is submitted again and continues from the newest checkpoint; --save-every bounds the loss. A test covers the command
# that runs on each node (tests/test_shard.py), no test covers the lines for Slurm.

#SBATCH --job-name=minidpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1        # one torchrun, which starts a rank for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0                    # all of it: the main rank loads the whole model
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120        # two minutes before the end, to this script alone

export MINIDPO_CACHE="${MINIDPO_CACHE:-$PWD/runs/cache}"
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))  # Any free port of the first node will do.
tries=${SLURM_RESTART_COUNT:-0}

# No --max-restarts: on several nodes torchrun's agents may disagree on which attempt it is (docs/RELIABILITY.md).
srun --kill-on-bad-exit=1 python -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" \
    --rdzv-backend=c10d --rdzv-endpoint="$first:$port" --rdzv-id="$SLURM_JOB_ID-$tries" \
    train_dpo.py --shard --save-every 200 --resume "$@" &

trap 'scontrol requeue "$SLURM_JOB_ID"; exit' USR1
wait $! || { [ "$tries" -lt 5 ] && scontrol requeue "$SLURM_JOB_ID"; }
