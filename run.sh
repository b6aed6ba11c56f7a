#!/usr/bin/env bash
# ./run.sh [--key=value ...]: train on the NVIDIA GPUs of this machine, or run the small demo if there is none.
# Arguments go to train_gpt.py.
set -euo pipefail
cd "$(dirname "$0")"
source tools/environment.sh
find_python run torch numpy tqdm huggingface_hub

case " $* " in
  *" --help "* | *" -h "* | *" --plan "*) exec "$PYTHON" train_gpt.py "$@" ;; # text only
esac

if [ "$GPUS" -eq 0 ]; then
  why="No NVIDIA GPU here"
  if gpu_listed; then
    case "${CUDA_VISIBLE_DEVICES-unset}" in
      "" | -1*) why="No NVIDIA GPU to be used, as CUDA_VISIBLE_DEVICES hides them" ;;
      *) exec "$PYTHON" tools/no_gpu.py ;; # says why, and fails
    esac
  fi
  echo "$why: running the CPU demo on the bundled sample."
  exec "$PYTHON" train_gpt.py --preset=demo "$@"
fi

# Its packages are faster than PyTorch's own operations, but not needed; an environment of yours is left alone
if [ "$PYTHON" = .venv/bin/python ] && [ "$HOPPER" = 1 ]; then
  "$PYTHON" -m pip install --quiet -r requirements-hopper.txt ||
    echo "warning: requirements-hopper.txt could not be installed; training goes on without it, slower" >&2
fi

case " $* " in
  *" --train_files"* | *" --preset=demo "* | *" --preset demo "*) ;; # other data is there already
  *) "$PYTHON" data/cached_fineweb10B.py 9 ;;
esac
for ranks in 8 4 2 1; do
  if [ "$GPUS" -ge "$ranks" ]; then break; fi
done
# Bad arguments, bad data and a machine that cannot do the run end here, in a line each, before eight processes start
"$PYTHON" tools/doctor.py --quick --quiet --check "$@"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
exec "$PYTHON" tools/launch.py --standalone --nproc_per_node="$ranks" train_gpt.py "$@"
