#!/usr/bin/env bash
# The GPU tests and benches: `bench/gpu_all.sh [PART...]`, tests, kernels, step, step-others, stages, loop, sampling; all by default.
# `first` and `second` are for a card at hand for a quarter of an hour, what matters most first: two calls of 480 and 270 s at most,
# with time between them to mend what the first one shows. `first`: every operator against float64, products and steps of the head by
# library GEMMs and by Plan A, a run with engine hf, a step of 0.5B, a start of vLLM. `second`: sampling with vLLM, a run with it,
# forms of Plan A, a phase. A part is cut off after $PART_S seconds (540; first 460, second 250), so that a call with one part fits in
# 10 minutes; pytest then tells what has failed, and benches have written what they had. Results go to ./gpu-results, and after every
# step as one archive to $OUT if it is set.
# Needs the package with its extras `dev` (pytest) and `bench` (TRL, Liger and CCE, used where importable)
# and, for the sampling engine and its tests, `vllm`: pip install -e '.[dev,bench,vllm]'. nvcc adds the native backend.
# Where the package is not installed it runs from the tree.
set -u
cd "$(dirname "$0")/.."
out=gpu-results
mkdir -p "$out"
status=0
all=(tests kernels step step-others stages loop sampling)
main_shape=4096x2048x128256
step_shape=1280x896x151936 # of a step of 0.5B on pairs of tldr: a launch may take the host longer than the device
bpo=(bpo-fast)
if ! command -v bpo-fast >/dev/null; then
  bpo=(python3 -m bpo_fast)
  export PYTHONPATH="$PWD:$PWD/kernels:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
fi
[ -w "${HOME:-}" ] || HOME=$(mktemp -d) && export HOME # of what is compiled
export VLLM_HOST_IP="${VLLM_HOST_IP:-127.0.0.1}" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" # there may be no network to ask
[ $# -gt 0 ] || set -- "${all[@]}"

run() { # name, command...: the command's output to a file, its end to the screen; later ones run whatever happens
  # $limit: seconds it may take, besides what is left of its part
  local name=$1 code=0 begun=$SECONDS left=$((deadline - SECONDS))
  shift
  [ "${limit:-$left}" -ge "$left" ] || left=$limit
  echo "== $name, $left s at most: $*"
  # interrupted, pytest and benches say what they have
  timeout -s INT -k 10 $((left > 1 ? left : 1)) "$@" >"$out/$name.log" 2>&1 || code=$?
  tail -n 40 "$out/$name.log"
  echo "== $name: exit $code after $((SECONDS - begun)) s"
  [ "$code" -eq 0 ] || status=1
  if [ -n "${OUT:-}" ]; then mkdir -p "$OUT" && tar -czf "$OUT/gpu-results.tgz" --exclude="*.safetensors" "$out"; fi
}

kernel_tests() { # tests and options of pytest; compiling takes most of their time, so they share the cores
  local cores=$(($(nproc) > 4 ? $(nproc) - 2 : 2))
  run gpu-tests python3 -m pytest -o addopts=-q --tb=short -n "$((cores > 14 ? 14 : cores))" -m gpu "$@"
}

engine_tests() { # options of pytest; they look at the memory of the whole card
  run gpu-engine-tests python3 -m pytest -o addopts=-q -m gpu tests/gpu/test_engine_gpu.py "$@"
}

main_job() { # name, options: the path of a user
  rm -rf "$out/run-$1"
  run "$1" "${bpo[@]}" train --task helpfulness --pairs 256 --device cuda --out "$out/run-$1" "${@:2}"
}

build_native() { # beside what comes next, which does without it
  local code='import torch; from bpo_fast_kernels.backends import pick_backend; pick_backend("native", torch.device("cuda"))'
  python3 -c "$code" >"$out/native.log" 2>&1 &
}

nvidia-smi >"$out/nvidia-smi.txt" 2>&1
for part in "$@"; do
  case $part in first) default=460 ;; second) default=250 ;; *) default=540 ;; esac
  deadline=$((SECONDS + ${PART_S:-$default}))
  case $part in
    first)
      build_native
      limit=140 kernel_tests tests/gpu/test_kernels_gpu.py -k "not native"
      # --op forward times the mm ceilings first: in the inputs' type, and with the float32 output that Plan B needs
      limit=120 run kernels "${bpo[@]}" bench kernels --op forward --op step --shapes "$main_shape" --shapes "$step_shape" --peers none \
        --json "$out/kernels.json"
      limit=70 main_job main-job-hf --engine hf
      limit=100 run step "${bpo[@]}" bench step --device cuda --lengths tldr --form lora --form full --rounds 2 --json "$out/step.json"
      engine_tests -k kv_cache # every test opens an engine, which compiles and captures graphs
      ;;
    second)
      build_native
      limit=100 run sampling "${bpo[@]}" bench sampling --form full --rounds 2 --memory-hidden 0 --json "$out/sampling.json"
      limit=90 main_job main-job
      # a form whose kernel breaks the device takes what comes after it along
      limit=70 run kernels-forms "${bpo[@]}" bench kernels --op forward --op step --head frozen --shapes "$main_shape" --peers compile \
        --tile 128x256x64x4 --tile 128x256x64x4p --json "$out/kernels-forms.json"
      run loop "${bpo[@]}" bench loop --device cuda --lengths helpfulness --form lora --rounds 1 --json "$out/loop.json"
      ;;
    tests)
      kernel_tests tests/gpu/test_kernels_gpu.py tests/gpu/test_stages_gpu.py
      engine_tests
      run doctor "${bpo[@]}" doctor
      ;;
    kernels)
      run kernels-static "${bpo[@]}" bench kernels --static --quick --op pair_loss --json "$out/kernels-static.json"
      run kernels-forward "${bpo[@]}" bench kernels --op forward --json "$out/kernels-forward.json" --plot "$out/kernels-forward"
      run kernels-plan-a "${bpo[@]}" bench kernels --op forward --op step --head frozen --peers none --tile 128x256x64x4 --tile 128x256x64x2 \
        --tile 128x256x64x3p --tile 128x256x64x4p --tile 128x128x64x3w4 --tile 64x256x64x4 --json "$out/kernels-plan-a.json" --plot "$out/kernels-plan-a"
      run kernels-behavior "${bpo[@]}" bench kernels --op behavior --json "$out/kernels-behavior.json" --plot "$out/kernels-behavior"
      run kernels-step "${bpo[@]}" bench kernels --op step --json "$out/kernels-step.json" --plot "$out/kernels-step"
      run kernels-draw "${bpo[@]}" bench kernels --op draw --json "$out/kernels-draw.json"
      run kernels-attention "${bpo[@]}" bench kernels --op attention --json "$out/kernels-attention.json" --plot "$out/kernels-attention"
      run kernels-trunk "${bpo[@]}" bench kernels --op norm --op gate --op adamw --json "$out/kernels-trunk.json" --plot "$out/kernels-trunk"
      run kernels-pair-loss "${bpo[@]}" bench kernels --op pair_loss --json "$out/kernels-pair-loss.json"
      run kernels-gauss "${bpo[@]}" bench kernels --op step --data gauss --shapes "$main_shape" --json "$out/kernels-gauss.json"
      ;;
    step) # the 0.5B shape in bf16
      run step "${bpo[@]}" bench step --device cuda --lengths tldr --rounds 3 --compile --json "$out/step.json"
      ;;
    step-others)
      run step-others "${bpo[@]}" bench step --device cuda --lengths helpfulness --lengths long --form lora --form full --rounds 3 --json "$out/step.json"
      ;;
    stages)
      run stages "${bpo[@]}" bench stages --device cuda --rounds 3 --json "$out/stages.json"
      ;;
    loop)
      run loop "${bpo[@]}" bench loop --device cuda --lengths helpfulness --lengths tldr --form lora --rounds 2 --json "$out/loop.json"
      ;;
    sampling) run sampling "${bpo[@]}" bench sampling --json "$out/sampling.json" ;;
    *)
      echo "no part $part: first, second, ${all[*]}" >&2
      exit 2
      ;;
  esac
done
exit "$status"
