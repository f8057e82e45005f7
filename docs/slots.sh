#!/bin/bash
#SBATCH --gres=gpu:1
#SBATCH --time=15
#SBATCH --no-requeue
#SBATCH --output=slots/%a.log
# Trains in the slots of docs/many-gpus.md: `bash docs/slots.sh 0 1 2` in these, each on the GPU of its number, and
# `sbatch --array=0-2 docs/slots.sh` in the same ones, each in a job of its own. No two rows have the same seed.

train() {
  export SEED=$((42 + $(wc -l < results.tsv) + $1))
  cd "slots/$1" || exit
  git log -1 --abbrev=7 --format='commit: %h' > run.log
  git diff --exit-code HEAD >> run.log || exit  # an edit without a commit is shown and not run
  uv run --no-sync --project ../.. train.py >> run.log 2>&1
}

if [ -n "$SLURM_ARRAY_TASK_ID" ]; then
  train "$SLURM_ARRAY_TASK_ID"
else
  for slot in "$@"; do
    CUDA_VISIBLE_DEVICES=$slot train "$slot" &
  done
  wait
fi
