#!/usr/bin/env bash
# Serve a model to OpenAI clients; examples/chat_client.py is one.
#
#     examples/serve.sh [MODEL] [OPTION OF serve.py]...
set -euo pipefail
model=${1:-.}
[[ $# -gt 0 ]] && shift
[[ -d "$model" ]] && model=$(realpath "$model")
cd "$(dirname "$0")/.."
[[ "$model" == . ]] && model=$PWD

exec "${PYTHON:-.venv/bin/python}" serve.py --model "$model" "$@"
