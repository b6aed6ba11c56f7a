# shellcheck shell=bash
# Sourced by run.sh and test.sh: sets PYTHON to an interpreter that can import the modules named as arguments.
# The python3 on the PATH serves if it can; otherwise .venv, which is made from requirements.txt if need be.
find_python() {
  local check="import importlib.util as u, sys; sys.exit(not all(u.find_spec(m) for m in sys.argv[1:]))"
  local candidate
  for candidate in .venv/bin/python python3; do
    if command -v "$candidate" > /dev/null && "$candidate" -c "$check" "$@"; then
      PYTHON=$candidate
      return
    fi
  done
  echo "Making .venv and installing requirements.txt (a minute or more; PyTorch is large)."
  python3 -m venv .venv
  .venv/bin/python -m pip install --quiet -r requirements.txt
  # shellcheck disable=SC2034  # read by the script that sources this
  PYTHON=.venv/bin/python
}
