# shellcheck shell=bash
# Sourced by run.sh and test.sh. find_python MODULE... sets
#   PYTHON      an interpreter that has these modules, among them torch: .venv's, or else the python3 on the PATH; if
#               neither has, .venv is made from requirements.txt
#   GPUS        how many GPUs its torch can use
#   CAPABILITY  the first one's major compute capability
#   FLASH_ATTN  1 if flash_attn is there, else 0
# All of this costs one start of Python, as a start with torch takes seconds.

# Runs on any Python 3. Status 3: too old, 4: a module is missing, 5: torch fails
PROBE='
import sys
if sys.version_info < (3, 11):
    print("%d.%d" % sys.version_info[:2])
    sys.exit(3)
import importlib.util
if not all(map(importlib.util.find_spec, sys.argv[1:])):
    sys.exit(4)
try:
    import torch
    gpus = torch.cuda.device_count()
    capability = torch.cuda.get_device_capability()[0] if gpus else 0
except Exception as error:
    print(" ".join(str(error).split()))
    sys.exit(5)
print(gpus, capability, int(importlib.util.find_spec("flash_attn") is not None))
'

# probe CANDIDATE MODULE...: sets the variables if the candidate serves. Otherwise STATUS is that of PROBE, or 127 if
# there is no such program, and FOUND what it printed.
probe() {
  STATUS=0
  FOUND=$(command -v "$1" > /dev/null || exit 127; "$1" -c "$PROBE" "${@:2}" 2> /dev/null) || STATUS=$?
  [ "$STATUS" -eq 0 ] || return 1
  # shellcheck disable=SC2034  # read by the script that sources this
  PYTHON=$1
  # shellcheck disable=SC2034
  read -r GPUS CAPABILITY FLASH_ATTN <<< "${FOUND##*$'\n'}"
}

stop() {
  echo "error: $1" >&2
  exit 1
}

find_python() {
  local own
  probe .venv/bin/python "$@" && return
  own=$STATUS
  probe python3 "$@" && return
  if [ "$own" -ne 4 ] && [ "$own" -ne 5 ]; then # .venv is missing, or its Python does not serve
    case "$STATUS" in
      127) stop "there is no python3 on the PATH; install Python 3.11 or newer" ;;
      3) stop "python3 is Python $FOUND here, but 3.11 or newer is needed; install one and make .venv with it, for \
example: python3.12 -m venv .venv" ;;
    esac
    if [ -e .venv ] || [ -L .venv ]; then
      [ "$own" -ne 3 ] || stop ".venv has a Python older than 3.11; remove it (rm -r .venv) and run this again"
      echo "The Python of .venv does not start any more: .venv is made anew."
      rm -rf .venv
    fi
  fi
  echo "Making .venv and installing requirements.txt (a minute or more; PyTorch is large)."
  if [ "$STATUS" -ne 127 ] && [ "$STATUS" -ne 3 ]; then
    python3 -m venv .venv || stop "python3 cannot make .venv; on Debian and Ubuntu, install the package python3-venv"
  fi
  .venv/bin/python -m pip install --quiet -r requirements.txt ||
    stop "requirements.txt could not be installed, see above; run this again to continue"
  probe .venv/bin/python "$@" || stop "requirements.txt is installed in .venv, but its torch fails: $FOUND"
}
