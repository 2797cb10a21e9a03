#!/usr/bin/env bash
# Clean a corpus: quality rules, no documents of test sets, no exact or near duplicates. The report names each removed document.
#
#     examples/deduplicate.sh OUTPUT FILE...
set -euo pipefail
output=$(realpath -m "$1")
shift
files=()
for file in "$@"; do files+=("$(realpath "$file")"); done
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

"$python" -m corpus.deduplicate "${files[@]}" --output "$output" --backend "${BACKEND:-datasketch}"
