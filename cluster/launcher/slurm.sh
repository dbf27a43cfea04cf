#!/bin/bash
# A Ray cluster for the length of one Slurm job, and one Manta job on it:
#   sbatch cluster/launcher/slurm.sh pretrain model=gpt2_124m train.workers=8 name=mine
# Fill in: the sizes below, and MANTA_ENV, a virtual environment with Manta on a file system that all nodes see.
#SBATCH --job-name=manta
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
set -euo pipefail

source "${MANTA_ENV:-$SLURM_SUBMIT_DIR/.venv}/bin/activate"
export RAY_USAGE_STATS_ENABLED=0 DO_NOT_TRACK=true
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$SLURM_SUBMIT_DIR/.manta-token-$SLURM_JOB_ID"
(umask 077 && openssl rand -hex 32 > "$RAY_AUTH_TOKEN_PATH")
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_ip=$(srun --nodes=1 --ntasks=1 -w "${nodes[0]}" hostname --ip-address | awk '{print $1}')
port=6379

# symmetric-run starts Ray on every node, runs the command on the head once all are alive, and ends with `ray stop`,
# which stops all of your Ray processes on these nodes: therefore --exclusive above
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
  ray symmetric-run --address "$head_ip:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_PER_NODE:-0}" -- \
  env RAY_ADDRESS="$head_ip:$port" python -m "jobs.${1:?which job: pretrain, finetune, sweep, ...}" "${@:2}" cluster.address=auto
