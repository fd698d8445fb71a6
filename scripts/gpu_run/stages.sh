# The stages of each call, the most valuable first: what nobody knows yet, then whether it is right, then what it costs.
#
# Read by run.sh, whose functions and variables these use. Limits are seconds on a machine with a GPU and 16 cores. The first call may
# take 480 s, the second 240 s. "least" is for where no more than four minutes are left in all.

bench() {  # bench NAME ARGUMENTS...: quick on the first call, so its figures are for reading, not for the repository
  local more=()
  [ -z "$FAKE" ] || more+=(--fake-cuda "$FAKE")
  [ ! -f "$GPU/kernels/manifest.json" ] || more+=(--carried "$GPU/kernels")
  [ "${FULL:-}" = 1 ] || more+=(--quick)
  "$PY" -m vattn bench --suite gpu --only "$1" --out "$R/bench${FULL:+-full}" "${more[@]}" "${@:2}"
}

boundaries() {  # on the fake with small pages, so that Triton's interpreter ends in seconds
  [ -z "$FAKE" ] || export VATTN_FAKE_CUDA_GRANULARITY=65536 VATTN_BENCH_PAGE=65536
  bench boundaries --check "$@"
}

tests() {  # tests EXPRESSION ARGUMENTS...: the Python tests of the CUDA driver, several at once where pytest can
  local expression=$1 many=()
  shift
  ! "$PY" -c 'import xdist' 2>/dev/null || many=(-n "$WORKERS")
  "$PY" -m pytest -p no:cacheprovider "${many[@]}" -k "$expression" "$@"
}

cpp() {  # cpp FILTER ARGUMENTS...: as on a GPU, with whatever libcuda.so.1 is
  local filter=$1
  shift
  # On the fake its tensors are the host's, so that one trait cannot be a GPU's.
  [ -z "$FAKE" ] || filter+='-*HasTheTraitsOfItsDevice'
  VATTN_TEST_GPU=1 "$GPU/cpp/vattn_tests" --gtest_filter="$filter" --gtest_brief=1 "$@" >"$R/cpp-full.log" 2>&1
  local status=$?
  cat "$R/cpp-full.log"
  grep -oE '^\[ +(PASSED|SKIPPED|FAILED) +\] [0-9]+ test' "$R/cpp-full.log" | tr '\n' ' '  # the counts, once more, in one line
  return $status
}

smoke() {
  local carried=()
  [ ! -f "$GPU/kernels/manifest.json" ] || carried=(--carried "$GPU/kernels")
  rm -f "$R/smoke.jsonl"
  "$PY" -m vattn.bench.gpu.smoke --out "$R/smoke.jsonl" "${carried[@]}" "$@"
}

machine() {
  nvidia-smi -q >"$R/nvidia-smi.txt" 2>&1 || true
  "$PY" -m vattn info
  "$PY" -c 'import torch, vattn; print("vattn", vattn.__version__, "torch", torch.__version__, "cuda", torch.cuda.is_available())'
}

sanitizer() {  # Reads and writes outside of what is mapped, by kernels: a few checks, under NVIDIA's memcheck.
  compute-sanitizer --tool memcheck --error-exitcode 1 "$PY" -m vattn.bench.gpu.smoke --only growth_in_place --only sdpa_on_views \
    --only free_under_a_reader
}

beside() {  # question 6 in long: pages come and go between ranges that kernels on 16 streams read; every word read is counted
  local asked='{"ordinal": 0, "run_seconds": 40, "streams": 16, "read_mib": 32, "rounds": 50}' seen
  [ -z "$FAKE" ] || asked='{"ordinal": 0, "run_seconds": 1, "streams": 4, "read_mib": 2, "rounds": 5}'
  seen=$("$PY" -m vattn.bench.gpu.driver_child beside "$asked") || return 1
  printf '%s\n' "$seen"
  [[ $seen == *'"words_read_wrong": 0'* ]]
}

FAST=${FAKE:+1}  # a second, where there is no GPU to stress
WORKERS=4
[ -z "$FAKE" ] || WORKERS=2
export -f bench boundaries tests cpp smoke machine sanitizer beside
export GPU R PY FAKE WORKERS VATTN_RUNNING_WORK_SECONDS=

# run NAME LIMIT FUNCTION...: a stage made of one of these functions.
run() { stage "$1" "$2" bash -c '"$@"' stage "${@:3}"; }

set_up() {
  stage install 60 bash -c "$(declare -f install); GPU='$GPU' WORK='$WORK' PY='$PY'; install" || return 1
  unpack_triton
  run machine 30 machine
}

cpp_if_carried() {
  if [ -x "$GPU/cpp/vattn_tests" ]; then run cpp 80 cpp '*uda*'; else skip cpp "no C++ tests are carried"; fi
}

call_1() {
  set_up || return 1
  run probe 20 "$PY" -m vattn.bench.gpu.probe --out "$R/probe.json"
  # Whether it is right: all at once, in processes of their own, since a fault costs the one that made it. No time of these means
  # anything.
  cpp_if_carried &
  run smoke 80 smoke &
  run tests 110 tests 'cuda and not running_work' &
  run boundaries 80 boundaries &
  wait
  run driver 90 bench driver  # its questions first
  VATTN_RUNNING_WORK_SECONDS=${FAST:-10} run stress 45 tests cuda tests/python/test_running_work.py
  run handles 30 bench handles  # may change the default page
  run decode 110 bench decode  # its last line says how many requests the memory held
  run kernel_decode 35 bench kernel_decode  # these two may change the default slicing
  run kernel_prefill 70 bench kernel_prefill
  run gpu_step 25 bench gpu_step
  run hf 60 bench hf
  [ -n "$FAKE" ] ||
    echo "Triton's kernels: $(find "$WORK/triton" -mindepth 1 -maxdepth 1 | wc -l) folders; more than were carried were compiled here"
}

call_2() {
  limit=240
  set_up || return 1
  local name
  for name in $(grep -E '^[^ ]+ +(failed|cut)' "$R/stages.1.txt" 2>/dev/null | cut -d ' ' -f 1); do
    case $name in
      tests) run again_tests 60 tests 'cuda and not running_work' -x -vv ;;
      cpp) run again_cpp 30 cpp '*uda*' --gtest_brief=0 ;;
      smoke) run again_smoke 30 smoke ;;
      stress) VATTN_RUNNING_WORK_SECONDS=${FAST:-10} run again_stress 45 tests cuda tests/python/test_running_work.py ;;
      probe | install | machine) ;;
      boundaries) run again_boundaries 60 boundaries --fresh ;;
      *) run "again_$name" 60 bench "$name" ;;  # goes on after the cases that are there
    esac
  done
  if command -v compute-sanitizer >/dev/null; then run sanitizer 40 sanitizer; else skip sanitizer "there is no compute-sanitizer"; fi
  FULL=1 run decode_full 110 bench decode  # 32, 16 or 8 requests of 16K tokens, by what is free
  run beside 60 beside
  run prefill_rows 45 bench prefill_rows
  run kernel_pages 40 bench kernel_pages
  run batch 50 bench batch
}

# Where four minutes are all there is.
call_least() {
  limit=150
  set_up || return 1
  run probe 20 "$PY" -m vattn.bench.gpu.probe --out "$R/probe.json"
  cpp_if_carried &
  run smoke 40 smoke &
  wait
  run driver 90 bench driver
}

# A minute at most, on a machine without a GPU: that the files and the stages fit together.
call_short() {
  set_up || return 1
  run probe 20 "$PY" -m vattn.bench.gpu.probe --out "$R/probe.json"
  if [ -x "$GPU/cpp/vattn_tests" ]; then run cpp 30 cpp 'CudaDriverTest.*'; fi
  run smoke 40 smoke --only growth_in_place --only what_a_capture_refuses
}
