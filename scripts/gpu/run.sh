#!/usr/bin/env bash
# Runs a bundle on a GPU host: machine, conformance, tests, sanitizer, benchmarks, each with its own time limit and log,
# and the table of goals last. Needs bash, python3 and a driver; docs/gpu.md says what each stage shows.
set -uo pipefail

usage() {
  cat <<'TEXT'
bash run.sh [options]

  --only LIST     stages, comma-separated: 1 machine, 2 conformance, 3 tests, 4 sanitizer, 5 benchmarks (default: all)
  --groups LIST   groups of the benchmarks (default: all; node benchmarks/gpu/run.mjs --help lists them)
  --seconds N     for everything (default: 570, dry 7200); each stage gets the less of its own limit and what is left
  --out DIR       logs and results (default: results)
  --dry-run       everything on the emulated device at tiny shapes: shows that the bundle works, measures nothing. Runs in
                  the clone that packed it: the emulation is in the addon of build/Release, not in the bundle's
                  (ELASTIFORM_NATIVE_PATH names another one)

ELASTIFORM_BENCH_PYTHON names a Python with PyTorch and Triton (default: python3).
TEXT
}

only=1,2,3,4,5 groups='' total='' out=results dry=''
while [ $# -gt 0 ]; do
  case $1 in
    --only) only=$2; shift ;;
    --groups) groups=$2; shift ;;
    --seconds) total=$2; shift ;;
    --out) out=$2; shift ;;
    --dry-run) dry=1 ;; # on a machine that may be busy and small
    --help) usage; exit 0 ;;
    *) echo "run.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
  esac
  shift
done
total=${total:-$([ -z "$dry" ] && echo 570 || echo 7200)}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$(dirname "$0")" || exit 2
if [ -n "$dry" ]; then
  export ELASTIFORM_NATIVE_PATH=${ELASTIFORM_NATIVE_PATH:-$(cd .. && pwd)/Release/elastiform.node}
  if [ ! -e "$ELASTIFORM_NATIVE_PATH" ]; then
    echo "run.sh: --dry-run needs an addon that emulates a device, and there is no $ELASTIFORM_NATIVE_PATH: npm run build" >&2
    exit 2
  fi
fi

# Unpacked once per bundle, outside of it: a bundle stays small enough to be sent again.
root=${TMPDIR:-/tmp}/elastiform-gpu-$(sha256sum manifest.json | cut -c 1-16)
unxz() {
  if command -v xz >/dev/null; then
    xz --decompress --stdout "$1"
  else
    python3 -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), sys.stdout.buffer)' "$1"
  fi
}
if [ ! -e "$root/complete" ]; then
  mkdir -p "$root/bin" && unxz files.tar.xz | tar -xf - -C "$root" && unxz node.xz >"$root/bin/node" &&
    chmod +x "$root/bin/node" && cp manifest.json "$root/" && touch "$root/complete" || {
    echo 'run.sh: the bundle cannot be unpacked' >&2
    exit 2
  }
fi
cd "$root" || exit 2
work=$root/work
rm -rf "$work"
mkdir -p "$work"
export PATH="$root/bin:$PATH" out work dry groups
export ELASTIFORM_DEVICE=cuda
[ -z "$dry" ] || export ELASTIFORM_DEVICE=simt

# stage NUMBER NAME LIMIT FUNCTION: the function's last line of output is the note of the summary. It ends with 77 when
# nothing could be run, with 78 when only a part could.
stage() {
  local number=$1 name=$2 limit=$3 body=$4 log=$out/$2.log state
  case ",$only," in *",$number,"*) ;; *) return 0 ;; esac
  local left=$((total - SECONDS)) start=$SECONDS
  [ -z "$dry" ] || limit=$((10 * limit))
  [ "$left" -ge "$limit" ] || limit=$left
  if [ "$limit" -lt 5 ]; then
    printf '%s\tout of time\t0\tnot begun\n' "$name" >>"$work/stages.tsv"
    return 0
  fi
  printf '\n== %s (at most %s s)\n' "$name" "$limit"
  limit=$limit timeout --kill-after=5 "$limit" bash -c "$body" >"$log" 2>&1
  case $? in
    0) state=passed ;;
    77) state='not run' ;;
    78) state='partly run' ;;
    124 | 137) state='out of time' ;;
    *) state=FAILED ;;
  esac
  tail -n 25 "$log"
  printf '%s\t%s\t%s\t%s\n' "$name" "$state" $((SECONDS - start)) "$(tail -n 1 "$log" | tr '\t' ' ' | cut -c 1-120)" \
    >>"$work/stages.tsv"
}

machine() {
  local fields=name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu
  head -n 4 manifest.json
  uname -srm
  command -v nvidia-smi >/dev/null && nvidia-smi && nvidia-smi --query-gpu=$fields --format=csv
  "${ELASTIFORM_BENCH_PYTHON:-python3}" -c 'import torch; print("torch", torch.__version__, torch.version.cuda)'
  "${ELASTIFORM_BENCH_PYTHON:-python3}" -c 'import triton; print("triton", triton.__version__)'
  for tool in compute-sanitizer nvcc ncu; do command -v $tool || echo "no $tool"; done
  # The addon of the bundle, which a dry run does not use: it must load and have CUDA kernels.
  node -e '
    const { devices } = require("./build/Release/elastiform.node").info();
    console.log(`the addon of the bundle: ${devices.cuda.description}`);
    process.exitCode = /no CUDA kernels/.test(devices.cuda.description) ? 1 : 0;' || exit 1
  node dist/cli/main.js doctor --json >"$work/doctor.json" || exit 1
  cat "$work/doctor.json"
  # The device must be there, or nothing below means anything.
  node -e '
    const { devices } = JSON.parse(require("fs").readFileSync(process.argv[1], "utf8"));
    const device = devices[process.env.ELASTIFORM_DEVICE];
    console.log(`${process.env.ELASTIFORM_DEVICE}: ${device.available ? "" : "cannot be used: "}${device.description}`);
    process.exitCode = device.available ? 0 : 1;' "$work/doctor.json"
}

conformance() {
  if [ -n "$dry" ]; then
    bin/elastiform_tests device
    return
  fi
  bin/elastiform_tests gpu || return 1
  # The device must be there, or nothing was shown.
  ! grep -q 'gpu: not run' "$out/conformance.log"
}

tests() {
  local files failed=0 began=$SECONDS
  if [ -n "$dry" ]; then
    files='test/ops/elementwise.test.js test/ops/routing.test.js test/graph/program.test.js test/elastic/policy.test.js'
  else
    files=$(node -p 'JSON.parse(require("fs").readFileSync("manifest.json", "utf8")).tests.join(" ")')
  fi
  echo 'a small model, against the CPU:'
  timeout $((limit / 2)) node scripts/gpu/agree.mjs --device "$ELASTIFORM_DEVICE" ${dry:+--tokens 16} || failed=1
  # shellcheck disable=SC2086
  node scripts/gpu/tests.mjs --summary "$work/tests.json" --seconds $((limit - SECONDS + began - 5)) $files || failed=1
  return $failed
}

sanitizer() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo 'no compute-sanitizer here'
    return 77
  fi
  local failed=0
  # check TOOL WHAT COMMAND...: at most half a minute each, or one would take it all.
  check() {
    local tool=$1 what=$2 code
    shift 2
    timeout 30 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 "$@" >"$work/sanitizer" 2>&1
    code=$?
    case $code in
      0) echo "$tool, $what: nothing found" ;;
      124) echo "$tool, $what: out of time" ;;
      *) echo "$tool, $what: FAILED ($code)"; failed=1 ;;
    esac
    [ $code = 0 ] || grep -E '^=========|FAILED|^# fail' "$work/sanitizer" | head -n 40
  }
  local tool name
  for tool in memcheck racecheck synccheck; do check $tool 'wrappers and kernels' bin/elastiform_tests gpu; done
  for name in linear attention routing; do
    for tool in memcheck racecheck; do check $tool "test/ops/$name.test.js" node "test/ops/$name.test.js"; done
  done
  return $failed
}

benchmarks() {
  node benchmarks/gpu/run.mjs --device "$ELASTIFORM_DEVICE" --seconds $((limit - 5)) --out "$out" --work "$work" \
    ${groups:+--only "$groups"} ${dry:+--dry-run}
}
export -f machine conformance tests sanitizer benchmarks

stage 1 machine 40 machine
stage 2 conformance 60 conformance
stage 3 tests 150 tests
stage 4 sanitizer 120 sanitizer
stage 5 benchmarks 400 benchmarks

printf '\n'
node scripts/gpu/finish.mjs --work "$work" --out "$out" ${dry:+--dry-run}
! grep -qE $'\t(FAILED|out of time)\t' "$work/stages.tsv"
