# shellcheck shell=bash
# Sourced by run.sh and test.sh. find_python run|test MODULE... sets
#   PYTHON  an interpreter that has these modules, among them torch: .venv's, or else the python3 on the PATH; if neither
#           has, .venv is made, for runs on a machine with an NVIDIA GPU from requirements-gpu.txt, else requirements.txt
#   GPUS    how many GPUs its torch can use
#   HOPPER  1 if requirements-hopper.txt fits the first of them and this torch, but is not installed; else 0
# All of this costs one start of Python, as a start with torch takes seconds.

# Runs on any Python 3. Status 3: too old, 4: a module is missing (it prints torch's version, if any), 5: torch fails
PROBE='
import sys
if sys.version_info < (3, 11):
    print("%d.%d" % sys.version_info[:2])
    sys.exit(3)
import importlib.metadata
from importlib.util import find_spec
if not all(map(find_spec, sys.argv[1:])):
    print(*(torch.version for torch in importlib.metadata.distributions(name="torch")))
    sys.exit(4)
try:
    import torch
    gpus = torch.cuda.device_count()
    fits = gpus and torch.cuda.get_device_capability()[0] == 9 and str(torch.version.cuda).startswith("13.")
except Exception as error:
    print(" ".join(str(error).split()))
    sys.exit(5)
print(gpus, int(fits and not (find_spec("flash_attn") and find_spec("quack"))))
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
  read -r GPUS HOPPER <<< "${FOUND##*$'\n'}"
}

stop() {
  echo "error: $1" >&2
  exit 1
}

gpu_listed() {
  [[ "$(nvidia-smi -L 2> /dev/null)" == *GPU* ]]
}

find_python() {
  local purpose=$1 packages=requirements.txt own torch
  shift
  probe .venv/bin/python "$@" && return
  own=$STATUS torch=$FOUND
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
  if [ "$purpose" = run ] && gpu_listed; then packages=requirements-gpu.txt; fi
  # Tests would replace the torch that was measured
  if [ "$purpose" = test ] && [ "$own" -eq 4 ] && [ -n "$torch" ] && ! grep -Fqx "torch==${torch%+*}" "$packages"; then
    stop ".venv has torch $torch, which tests leave alone; for them: python3 -m venv .venv-test && .venv-test/bin/python \
-m pip install -r $packages && PATH=\"\$PWD/.venv-test/bin:\$PATH\" ./test.sh"
  fi
  echo "Making .venv and installing $packages (a minute or more; PyTorch is large)."
  if [ "$STATUS" -ne 127 ] && [ "$STATUS" -ne 3 ]; then
    python3 -m venv .venv || stop "python3 cannot make .venv; on Debian and Ubuntu, install the package python3-venv"
  fi
  .venv/bin/python -m pip install --quiet -r $packages ||
    stop "$packages could not be installed, see above; run this again to continue"
  probe .venv/bin/python "$@" || stop "$packages is installed in .venv, but its torch fails: $FOUND"
}
