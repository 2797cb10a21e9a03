#!/usr/bin/env bash
# Fine-tune on your own data, from a clean clone, and try the result.
#
#     examples/finetune_own_data.sh [DATA.jsonl] [MODEL]
#
# DATA: one {"messages": [...]} a line (docs/finetuning.md has the other formats); without it, number problems are made.
# MODEL: folder or Hub name; without it, this repository. PYTHON says which interpreter, OUTPUT where the result goes,
# STEPS how long to train.
set -euo pipefail
data=${1:-}
model=${2:-}
python=${PYTHON:-.venv/bin/python}
output=${OUTPUT:-}
# paths are meant from where the script is called
[[ -n "$data" ]] && data=$(realpath "$data")
[[ -d "$model" ]] && model=$(realpath "$model")
[[ -n "$output" ]] && output=$(realpath -m "$output")
cd "$(dirname "$0")/.."
model=${model:-.}
output=${output:-runs/own-data}

if [[ -z "${PYTHON:-}" && ! -x "$python" ]]; then
    make .venv/installed
fi
if [[ -z "$data" ]]; then
    "$python" -m finetune.problems --output "$output-data" --train-examples 4000 --held-out-examples 100
    data=$output-data/train.jsonl
fi

# 1. Train a LoRA adapter; a tenth of the data is held out, the best checkpoint by held-out loss is kept.
"$python" -m finetune.sft --model "$model" --data "$data" --output "$output" \
    --learning-rate 2e-3 --batch-size 16 ${STEPS:+--steps "$STEPS"}

# 2. Merge it, shard by shard, into a checkpoint that any engine reads.
"$python" -m finetune.merge --model "$model" --adapter "$output/final" --output "$output/merged"

echo "adapter: $output/final    merged model: $output/merged    report: $output/report.html"
