#!/usr/bin/env bash
# One call on a GPU machine: GPU tests, kernel bench, end-to-end bench. Results go to $OUT, or ./gpu-results.
# Needs the package with its extras `dev` (pytest) and `bench` (TRL for `bench step`; Liger and CCE, used where importable)
# and, for the sampling engine and its tests, `vllm`: pip install -e '.[dev,bench,vllm]'. nvcc adds the native backend.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-./gpu-results}
mkdir -p "$out"
status=0

run() { # name, command...: the command's output to a file, its end to the screen; later parts run whatever happens
  local name=$1 code=0
  shift
  echo "== $name: $*"
  "$@" >"$out/$name.log" 2>&1 || code=$?
  tail -n 40 "$out/$name.log"
  echo "== $name: exit $code"
  [ "$code" -eq 0 ] || status=1
}

nvidia-smi >"$out/nvidia-smi.txt" 2>&1
run gpu-tests python -m pytest -n 0 -m gpu tests/gpu  # one process: the tests of memory want the card alone
run kernels-static bpo-fast bench kernels --static --quick --op pair_loss --json "$out/kernels-static.json"
# --op forward times the mm ceilings first: in the inputs' type, and with the float32 output that Plan B needs
run kernels-forward bpo-fast bench kernels --op forward --json "$out/kernels-forward.json" --plot "$out/kernels-forward"
run kernels-plan-a bpo-fast bench kernels --op forward --op step --head frozen --peers none --tile 128x256x64x4 --tile 128x256x64x2 \
  --tile 128x128x64x4 --tile 128x128x64x3 --tile 64x256x64x4 --json "$out/kernels-plan-a.json" --plot "$out/kernels-plan-a"
run kernels-behavior bpo-fast bench kernels --op behavior --json "$out/kernels-behavior.json" --plot "$out/kernels-behavior"
run kernels-step bpo-fast bench kernels --op step --json "$out/kernels-step.json" --plot "$out/kernels-step"
run kernels-pair-loss bpo-fast bench kernels --op pair_loss --json "$out/kernels-pair-loss.json"
run kernels-gauss bpo-fast bench kernels --op step --data gauss --shapes 4096x2048x128256 --json "$out/kernels-gauss.json"
run step bpo-fast bench step --json "$out/step.json"
run doctor bpo-fast doctor
run sampling bpo-fast bench sampling --json "$out/sampling.json"
exit "$status"
