#!/usr/bin/env bash
# Train the model of this folder further on your own documents, with its own tokenizer.
#
#     examples/pretrain_own_text.sh DOCUMENTS.jsonl [OUTPUT]
#
# One {"text": ...} a line (python -m corpus.split makes them of a .txt). MODEL, STEPS, HELD_OUT and PYTHON change the rest.
set -euo pipefail
documents=$(realpath "$1")
output=$(realpath -m "${2:-runs/own-text}")
model=${MODEL:-.}
[[ -d "$model" ]] && model=$(realpath "$model")
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[[ "$model" == . ]] && model=$PWD

"$python" -m pretrain.data --files text "$documents" --tokenizer "$model" --held-out-fraction "${HELD_OUT:-0.05}" \
    --min-held-out-bytes 1000 --output "$output/data"
"$python" -m pretrain.train --model "$model" --start weights --data "$output/data" --tokenizer "$model" \
    --run-dir "$output/run" --export-dir "$output/model" --steps "${STEPS:-500}" --learning-rate 5e-4 \
    --warmup-steps $((${STEPS:-500} / 20 + 1)) --batch-rows 8 --row-tokens 256
"$python" -m pretrain.evaluate "$output/model" --data "$output/data" --context-tokens 256
