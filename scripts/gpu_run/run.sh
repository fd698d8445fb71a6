#!/usr/bin/env bash
# What runs on a machine with a GPU that is lent for minutes: bash .gpu/run.sh CALL, with OUT naming an empty folder.
#
# `scripts/gpu-run prepare` puts it, with all that it needs, into .gpu; CALL is a function call_CALL of stages.sh beside it. Nothing is
# downloaded or compiled. Promise: after every stage everything known so far is in OUT/results.tar.gz, written beside it and renamed, so
# whatever ends this script, and whenever, that file is whole; a stage is in it before its line is printed. A stage has its own limit;
# where less than that remains of the call's it has what remains, and where that is less than half it is left out. Exit status: 0 where every stage that ran ended well, and none was left out.
#
# The settings of the machine are left alone. For a machine without a GPU: VATTN_GPU_RUN_FAKE names the fake libcuda, which is then found
# under the name libcuda.so.1; VATTN_GPU_RUN_WORK where to work, VATTN_GPU_RUN_SLOW by what limits are multiplied, PYTHON which one.
set -u
call=${1:-1}
GPU=$(cd "$(dirname "$0")" && pwd)
cd "$GPU/.." || exit 1
: "${OUT:?names the folder for results}"
WORK=${VATTN_GPU_RUN_WORK:-/tmp/vattn-gpu-run}
R=$WORK/results
PY=${PYTHON:-python3}
SLOW=${VATTN_GPU_RUN_SLOW:-1}
FAKE=${VATTN_GPU_RUN_FAKE:-}
begin=$SECONDS
limit=480
mkdir -p "$R" "$OUT"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# Everything so far, whole or not at all; several may want to at once.
pack() {
  (
    flock 9
    rm -f "$OUT"/.results.*
    tar czf "$OUT/.results.$BASHPID" -C "$R" . 2>/dev/null  # a file that grows meanwhile is in it as far as it was read
    mv "$OUT/.results.$BASHPID" "$OUT/results.tar.gz"
  ) 9>"$WORK/lock"
}

# tell NAME OUTCOME SECONDS WORDS: a line, in the results before it is printed.
tell() {
  local line
  line=$(printf '%-16s %-10s %4ss at %4ss  %s' "$1" "$2" "$3" "$((SECONDS - begin))" "$4")
  printf '%s\n' "$line" >>"$R/stages.$call.txt"
  pack
  printf '%s\n' "$line"
}

# stage NAME LIMIT COMMAND...: its output in NAME.log, its last line told. Its status is the stage's.
stage() {
  local name=$1 most=$(($2 * SLOW)) start=$SECONDS left status words
  shift 2
  left=$((limit * SLOW - (SECONDS - begin) - 2)) # two seconds are for the last tar
  if [ $((2 * left)) -lt "$most" ]; then
    tell "$name" "left out" 0 "it may take ${most}s, and ${left}s are left of the call"
    return 1
  fi
  [ "$most" -le "$left" ] || most=$left
  timeout -k 5 "$most" "$@" >"$R/$name.log" 2>&1
  status=$?
  words=$(grep -v '^[[:space:]]*$' "$R/$name.log" | tail -n 1 | cut -c 1-120)
  if [ $status = 0 ]; then
    tell "$name" ok $((SECONDS - start)) "$words"
  elif [ $status = 124 ] || [ $status = 137 ]; then
    tell "$name" "cut ($status)" $((SECONDS - start)) "$words"
  else
    tell "$name" "failed ($status)" $((SECONDS - start)) "$words"
  fi
  return $status
}

# skip NAME WHY: for what was not carried.
skip() { tell "$1" "skipped" 0 "$2"; }

# The wheels, once a machine; a Python that has vattn already, where none are carried.
install() {
  ls "$GPU"/wheels/*.whl >/dev/null 2>&1 || { echo "no wheels are carried: the Python's own vattn"; return 0; }
  [ -d "$WORK/site" ] && return 0
  rm -rf "$WORK/site.new"
  "$PY" -m pip install -q --disable-pip-version-check --no-index --find-links "$GPU/wheels" --no-deps --no-compile --no-cache-dir \
    --target "$WORK/site.new" vattn nanobind-backend && mv "$WORK/site.new" "$WORK/site"
}

# Triton's compiled kernels, once a machine.
unpack_triton() {
  [ -d "$WORK/triton" ] && return 0
  mkdir -p "$WORK/triton"
  [ ! -f "$GPU/triton-cache.tar.xz" ] || tar xJf "$GPU/triton-cache.tar.xz" -C "$WORK/triton"
}

if [ -n "$FAKE" ]; then
  mkdir -p "$WORK/lib"
  ln -sf "$FAKE" "$WORK/lib/libcuda.so.1"
  export LD_LIBRARY_PATH="$WORK/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" VATTN_FAKE_CUDA=$FAKE
else
  export VATTN_TEST_GPU=1 TRITON_CACHE_DIR="$WORK/triton" TORCH_CUDNN_SDPA_DEPRIORITIZED=1
fi
export PYTHONPATH="$WORK/site${PYTHONPATH:+:$PYTHONPATH}"
rm -f "$R/stages.$call.txt"

# shellcheck source=stages.sh
. "$GPU/stages.sh"
"call_$call"
status=$?
echo "--- call $call: $((SECONDS - begin))s"
cut -c 1-100 "$R/stages.$call.txt"
# The table says more than the last stage's status.
! grep -qE '^[^ ]+ +(failed|cut|left out)' "$R/stages.$call.txt" || status=1
exit $status
