#!/usr/bin/env bash
# What only a GPU can show, in stages, in order of worth: numbers, times, hazards, tests, whole iterations.
#
#   bench/gpu_check.sh                 every stage that fits into BUDGET seconds (300); those left out are named
#   bench/gpu_check.sh STAGE …         these stages, whatever they take: what failed, or was left out
#   bench/gpu_check.sh --list          the stages and their limits in seconds
#   bench/gpu_check.sh --cpu [STAGE …] a rehearsal on a CPU, on tiny sizes, without what needs a GPU
#
# It needs no network, no installation and no git repository: torch, triton, transformers, peft, pytest and pytest-xdist
# have to be there, and what else fastgrpo needs (bench/gpu_wheels.txt) either too or as wheels in WHEELS, `make
# gpu-wheels`. Logs and rows go to OUT. PYTHON names the interpreter. It fails if a stage does.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cpu=
if [ "${1:-}" = --cpu ]; then cpu=--cpu; shift; fi

names=()
declare -A limits commands
add() { names+=("$1"); limits[$1]=$2; commands[$1]=$3; }
shapes_run() { echo "rm -rf \$OUT/$1 && \$PYTHON -m fastgrpo train configs/shapes-flux.yaml run.dir=\$OUT/$1 eval.images=8 $2 && \$PYTHON -m bench.gpu_check run \$OUT/$1"; }
real_run() { echo "\$PYTHON -m fastgrpo bench train --size real --model $1 --iterations 1 --no-write --json"; }

add environment 30 "\$PYTHON -m bench.gpu_check environment $cpu"
add numerics 60 "\$PYTHON -m bench.gpu_check numerics $cpu"
add host 40 "\$PYTHON -m bench.gpu_check host $cpu"
add device 90 "\$PYTHON -m bench.gpu_check device $cpu"
add races 40 "\$PYTHON -m bench.gpu_check races $cpu"
add compiled 120 "\$PYTHON -m bench.gpu_check compiled $cpu"
add tests-gpu 90 "\$PYTHON -m pytest tests/gpu -q -p no:cacheprovider"
if [ -z "$cpu" ]; then
  add tests-kernels 150 "\$PYTHON -m pytest tests/kernels -q -p no:cacheprovider -n 8 --maxfail=30 -m 'not full'"
else
  add tests-kernels 150 "\$PYTHON -m pytest tests/kernels/test_log_prob.py tests/kernels/test_transitions.py -q -p no:cacheprovider -m 'not full'"
fi
add train 60 "$(shapes_run train 'train.iterations=3')"
add lora 60 "$(shapes_run lora "train.iterations=3 model.dtype=bfloat16 'model.lora={rank: 4}'")"
add train-compiled 150 "$(shapes_run train-compiled 'train.iterations=3 model.compile=blocks')"
add inductor 120 "\$PYTHON -m bench.gpu_check inductor $cpu"
add real-stable-diffusion 300 "$([ -z "$cpu" ] && real_run stable_diffusion || echo none)"
add real-flux 540 "$([ -z "$cpu" ] && real_run flux || echo none)"
add ncu 60 "$([ -z "$cpu" ] && echo "ncu --clock-control none -k regex:shift_moments -c 2 --section SpeedOfLight --section Occupancy \$PYTHON -m bench.gpu_check moments" || echo none)"

if [ "${1:-}" = --list ]; then
  for name in "${names[@]}"; do echo "$name ${limits[$name]}"; done
  exit
fi
chosen=("$@")
budget=
if [ $# = 0 ]; then chosen=("${names[@]}"); [ -n "$cpu" ] || budget=${BUDGET:-300}; fi
for name in "${chosen[@]}"; do
  [ -n "${limits[$name]:-}" ] || { echo "gpu_check: unknown stage '$name'; one of: ${names[*]}" >&2; exit 2; }
done

export PYTHON=${PYTHON:-python3} OUT PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
OUT=$(mkdir -p "${OUT:-runs/gpu-check}" && cd "${OUT:-runs/gpu-check}" && pwd)
site=$OUT.site
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
# Outside OUT: thousands of small files that nobody reads.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$OUT.cache/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$OUT.cache/inductor}
wheels=${WHEELS:-.wheels}
if [ -d "$wheels" ] && [ ! -d "$site" ]; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit
fi
[ -d "$site" ] && PYTHONPATH=$PYTHONPATH:$site

begin=$SECONDS failed=() left=()
for name in "${chosen[@]}"; do
  if [ "${commands[$name]}" = none ]; then echo "$name: needs a GPU, not rehearsed"; continue; fi
  # Two cores, shared, compile slowly.
  limit=$((limits[$name] * (${#cpu} ? 3 : 1)))
  if [ -n "$budget" ]; then
    remaining=$((budget - SECONDS + begin))
    if [ $remaining -lt 15 ]; then left+=("$name"); continue; fi
    [ $remaining -ge "$limit" ] || limit=$remaining
  fi
  echo "== $name, ${limit} s at most"
  stage=$SECONDS
  timeout --kill-after=5 "$limit" bash -c "${commands[$name]}" >"$OUT/$name.log" 2>&1
  rc=$?
  tail -n 12 "$OUT/$name.log" | cut -c 1-300
  line="$name: $([ $rc = 0 ] && echo passed || { [ $rc = 124 ] && echo "FAILED, ended after $limit s" || echo "FAILED ($rc)"; }), $((SECONDS - stage)) s"
  echo "$line" | tee -a "$OUT/summary.txt"
  [ $rc = 0 ] || failed+=("$name")
done
[ ${#left[@]} = 0 ] || echo "left out, for want of time: ${left[*]}"
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]} (logs in $OUT)"; exit 1; }
