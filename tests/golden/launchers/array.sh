#!/bin/bash
#SBATCH --job-name=quickstart_rank
#SBATCH --array=0-1
#SBATCH --output='/runs/my sweep/slurm/%A_%a.log'
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --nodes=2
#SBATCH --time=8:00:00

# A unit each; `python -m experiments.sweep` wrote this.
units=(
  RANK=1
  RANK=8
)
unit=${units[SLURM_ARRAY_TASK_ID]}

# Seconds between SIGTERM and SIGKILL: a run says if a save takes longer.
HEPTAD_GRACE_SECONDS=$(scontrol show config | awk '$1 == "KillWait" {print $3}')
export HEPTAD_GRACE_SECONDS

# SIGTERM is for the run, which saves: this shell, and srun, wait for it.
trap '' TERM

for attempt in 1 2; do
  srun --kill-on-bad-exit=0 --wait=300 python -m experiments.train \
    --config='/runs/my sweep/units'/"$unit".gin \
    --workdir='/runs/my sweep/units'/"$unit" \
    --result='/runs/my sweep/units'/"$unit".json \
    --devices=2 \
    >> '/runs/my sweep/units'/"$unit".log 2>&1
  status=$?
  case $status in
    0) exit 0 ;;
    42 | 143)  # saved on request, or had nothing to save yet
      scontrol requeue incomplete "$SLURM_JOB_ID"
      exit $status ;;
  esac
  echo "$unit: attempt $attempt of 2 ended with $status"
done
exit $status
