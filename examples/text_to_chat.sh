#!/usr/bin/env bash
# From a text file to a chat with a small model of one's own: tokenizer, data, model, training, a lesson in answering, one answer.
#
#     examples/text_to_chat.sh TEXT.txt [OUTPUT]
#
# All that is made lies in OUTPUT (default runs/own-model). The sizes fit a text of a few megabytes and an hour of a CPU;
# LANGUAGE, VOCABULARY, PARAMETERS, STEPS, LESSON_STEPS, HELD_OUT and PYTHON change them. Run again with RESUME=1 after a stop in
# the training.
set -euo pipefail
text=$(realpath "$1")
output=$(realpath -m "${2:-runs/own-model}")
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
held_out=${HELD_OUT:-0.05}

if [[ -z "${RESUME:-}" ]]; then
    # 1. Documents: a .txt is one, and some must be held out to measure the model with.
    "$python" -m corpus.split "$text" --output "$output/documents.jsonl"
    # 2. A tokenizer that has not seen the held-out documents.
    "$python" -m tokenization.train_bpe "$output/documents.jsonl" --vocab-size "${VOCABULARY:-4096}" \
        --held-out-fraction "$held_out" --output "$output/tokenizer"
    # 3. Tokens, packed for training.
    "$python" -m pretrain.data --files "${LANGUAGE:-text}" "$output/documents.jsonl" --tokenizer "$output/tokenizer" \
        --held-out-fraction "$held_out" --min-held-out-bytes 1000 --output "$output/data"
    # 4. A model of a size; what training it takes is said.
    "$python" -m pretrain.config --tokenizer "$output/tokenizer" --parameters "${PARAMETERS:-8M}" --family v3 \
        --context 1024 --output "$output/config"
fi
# 5. Training; report.html shows it.
"$python" -m pretrain.train --model "$output/config" --data "$output/data" --tokenizer "$output/tokenizer" \
    --run-dir "$output/run" --export-dir "$output/base" --steps "${STEPS:-1000}" --optimizer muon --learning-rate 4e-3 \
    --warmup-steps $((${STEPS:-1000} / 20 + 1)) --batch-rows 8 --row-tokens 256 ${RESUME:+--resume}
# 6. The base model goes on with texts. A few conversations teach it whose turn it is.
"$python" -m finetune.sft --config examples/sft.yaml --model "$output/base" --method full --output "$output/chat" \
    --learning-rate 1e-3 --steps "${LESSON_STEPS:-60}"
# 7. Talk: without --prompt this is a chat in the terminal.
"$python" chat.py --model "$output/chat/final" --prompt "Who are you?" --max-new-tokens 40 || [[ $? == 3 ]]  # 3: cut
echo "next: $python chat.py --model $output/chat/final    report: $output/run/report.html"
