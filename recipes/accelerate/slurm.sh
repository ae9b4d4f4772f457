#!/usr/bin/env bash
# Eight machines with eight GPUs each, through Slurm:
#   sbatch recipes/accelerate/slurm.sh recipes/accelerate/multi_node.yaml --inner_sync node
# The first argument is the accelerate file. All others go to the recipe. Shortly before its time limit, the job is
# requeued. It then resumes from its last checkpoint (`save_steps`). The variable OUTPUT_DIR names another folder.
#SBATCH --job-name=nexus-3b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
# Fill in what your cluster requires:
##SBATCH --partition=...
##SBATCH --account=...
set -uo pipefail
# source .venv/bin/activate  # activate your environment here

accelerate_file=${1:?the first argument is the accelerate file, such as recipes/accelerate/multi_node.yaml}
shift
for argument in "$@"; do
  case $argument in
    --output[-_]dir | --output[-_]dir=*)
      echo "--output_dir: the script looks for checkpoints in OUTPUT_DIR. Set that variable instead." >&2
      exit 2
      ;;
  esac
done
output=${OUTPUT_DIR:-runs/nexus-3b}
export MAIN_HOST
MAIN_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

resume=()
# The second is one that a killed run has completed, and that gets its name when training starts.
for saved in "$output/checkpoint-*" "$output/_incomplete/checkpoint-*"; do
  if compgen -G "$saved/manifest.json" > /dev/null; then
    resume=(--resume_from_checkpoint last)
  fi
done

# Without this variable, srun gives a task one core, whatever sbatch was given.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# Single quotes, because SLURM_NODEID differs between machines.
# shellcheck disable=SC2016
srun bash -c 'exec accelerate launch --config_file "$0" --machine_rank "$SLURM_NODEID" \
  --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * 8)) --main_process_ip "$MAIN_HOST" "$@"' \
  "$accelerate_file" recipes/pretrain_3b.py --config 3b --output_dir "$output" "${resume[@]}" "$@" &
run=$!
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1 # not TERM, which scancel sends
wait "$run"
