#!/usr/bin/env bash
# One call on a GPU machine: GPU tests, kernel bench, end-to-end bench. Results go to $OUT, or ./gpu-results.
# Needs the package with its `dev` extra installed; peers (liger-kernel, cut-cross-entropy) are used where importable.
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
run gpu-tests python -m pytest -q -m gpu tests/gpu
run kernels-forward python -m bpo_fast_bench.kernels --op forward --json "$out/kernels-forward.json" --plot "$out/kernels-forward"
run kernels-behavior python -m bpo_fast_bench.kernels --op behavior --json "$out/kernels-behavior.json" --plot "$out/kernels-behavior"
run kernels-step python -m bpo_fast_bench.kernels --op step --json "$out/kernels-step.json" --plot "$out/kernels-step"
run kernels-pair-loss python -m bpo_fast_bench.kernels --op pair_loss --json "$out/kernels-pair-loss.json"
run kernels-gauss python -m bpo_fast_bench.kernels --op step --data gauss --shapes 4096x2048x128256 --json "$out/kernels-gauss.json"
run step bpo-fast bench step --json "$out/step.json"
run doctor bpo-fast doctor
run sampling bpo-fast bench sampling --json "$out/sampling.json"
exit "$status"
