#!/usr/bin/env bash
# All that needs a GPU, for a machine that is at hand for minutes.
#
#     examples/bench/gpu.sh OUT [FOLDER]       OUT: where results go; FOLDER: data sets for target.py (see ddpn_fx.data)
#
# First the tests run, and beside them every program of the benchmarks is compiled once, into a cache. Then, with the
# machine at rest, the benchmarks are timed with what is in the cache. Each part has a limit; one that fails leaves the
# others their turn, and the script fails at its end. Environment: PYTHON (python3), JOBS (processes of tests, 10),
# DEVICE (cuda), MODELS, TASKS, LIMIT (seconds for tests and compilation, 190).
set -uo pipefail
out="$(realpath -m "${1:?usage: gpu.sh OUT [FOLDER]}")"
folder="${2:+$(realpath "$2")}"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mkdir -p "$out"
cache="$(mktemp -d)"
trap 'rm -rf "$cache"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TORCHINDUCTOR_CACHE_DIR="$cache" TRITON_CACHE_DIR="$cache/triton" TORCHINDUCTOR_COMPILE_THREADS=2
python="${PYTHON:-python3}"
device="${DEVICE:-cuda}"
limit="${LIMIT:-190}"
read -ra models <<<"${MODELS:-mlp cnn gpt resnet18-gn}"
read -ra tasks <<<"${TASKS:-mnist-128 mnist-512 mnist-1024 mnist-cnn-64 cifar-cnn-512 gpt-32}"
common=(--device "$device" --mode reduce-overhead)
steps=("$python" examples/bench/step.py "${common[@]}" --methods default eigen-factored --warm 12)
targets=("$python" examples/bench/target.py "${common[@]}" --data "$folder" --trainings examples/results/bench/target.json
  --rows DDPNOpt "eigen-factored, Nesterov 0.9, lr 0.01" --tasks)

echo "tests, and compilation beside them"
timeout "$limit" "$python" -m pytest -m cuda tests/test_cuda.py -n "${JOBS:-10}" -p no:cacheprovider -p no:benchmark \
  --show-capture=no --tb=short >"$out/tests.txt" 2>&1 &
tests=$!
failed=()
for model in "${models[@]}"; do
  OMP_NUM_THREADS=2 timeout "$limit" "${steps[@]}" --models "$model" --repeats 2 --out "$cache/$model.json" \
    >"$cache/$model.txt" 2>&1 &
done
if [[ -n "$folder" ]]; then
  for task in "${tasks[@]}"; do
    timeout "$limit" "${targets[@]}" "$task" --out "$cache/$task.json" >"$cache/$task.txt" 2>&1 &
  done
fi
wait "$tests" || failed+=(tests)
wait
cat "$cache"/*.txt >"$out/compilation.txt"

echo "steps"
timeout 120 "${steps[@]}" --models "${models[@]}" --repeats 40 --out "$out/step_cuda.json" >"$out/step.txt" 2>&1 || failed+=(steps)
tail -n 24 "$out/step.txt"
if [[ -n "$folder" ]]; then
  echo "targets"
  timeout 120 "${targets[@]}" "${tasks[@]}" --out "$out/target_cuda.json" >"$out/target.txt" 2>&1 || failed+=(targets)
  tail -n 36 "$out/target.txt"
fi
grep -v '^  ' "$out/tests.txt" | tail -n 40
((${#failed[@]} == 0)) || { echo "gpu.sh: FAILED: ${failed[*]}; see $out" >&2 && exit 1; }
