#!/usr/bin/env bash
# Run on one GPU what no CPU can show: tests/gpu and benchmarks/gpu.py, in under 25 minutes. Write one JSON file and one
# Markdown table. Without a GPU the same script rehearses on the CPU at toy size, which shows that it works.
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'END'
usage: scripts/gpu_suite.sh [--out FOLDER] [--part tests|benchmark] [--wheels FOLDER] [-- flags of benchmarks/gpu.py]
       scripts/gpu_suite.sh --list             print the packages that a machine without a network needs as wheels
       scripts/gpu_suite.sh --fetch FOLDER     download them, on a machine with a network

A bare machine needs Python 3.12 and torch 2.11 or newer with CUDA. Set PYTHON to its interpreter (default: python3).
END
}

fail() {
    printf 'scripts/gpu_suite.sh: %s\n' "$*" >&2
    exit 2
}

# What the package and its tests import, with what that needs, and without torch and what comes with torch. A test
# compares the list with the installed packages' own requirements.
wheels=(
    accelerate annotated-types anyio certifi charset-normalizer click h11 hf-xet httpcore2 httpx2 huggingface-hub idna
    iniconfig markdown-it-py mdurl narwhals numpy packaging plotly pluggy psutil pydantic pydantic-core pygments pytest
    pytest-timeout pyyaml regex requests rich safetensors tiktoken tokenizers tqdm truststore typing-inspection urllib3
)

# The versions are those of constraints.txt, where a name may be written in another way.
list_wheels() {
    local name
    for name in "${wheels[@]}"; do
        sed 's/_/-/g' constraints.txt | grep -i "^$name==" || fail "$name is not in constraints.txt"
    done
}

fetch_wheels() {
    local platforms=() glibc
    for glibc in 1 5 12 17 24 27 28 31 34; do
        platforms+=(--platform "manylinux_2_${glibc}_x86_64")
    done
    list_wheels >"$1/requirements.txt"
    "$python" -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
        --dest "$1" --requirement "$1/requirements.txt"
}

python=${PYTHON:-python3}
out=build/gpu_suite
parts="tests benchmark"
packages=""
while [ $# -gt 0 ]; do
    case $1 in
        --list) list_wheels && exit ;;
        --fetch) mkdir -p "$2" && fetch_wheels "$2" && exit ;;
        --out) out=$2 && shift 2 ;;
        --part) parts=$2 && shift 2 ;;
        --wheels) packages=$2 && shift 2 ;;
        --) shift && break ;;
        -h | --help) usage && exit ;;
        *) usage >&2 && fail "\"$1\" is not an option" ;;
    esac
done
case $parts in tests | benchmark | "tests benchmark") ;; *) fail "--part $parts: use tests or benchmark" ;; esac
mkdir -p "$out"
out=$(cd -- "$out" && pwd)

export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -n "$packages" ]; then
    # Into a folder of its own: the machine's own packages stay as they are.
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$out/site" "$packages"/*.whl
    export PYTHONPATH=$PWD:$out/site:${PYTHONPATH#*:}
fi
"$python" -c 'import torch' 2>/dev/null || fail "$python has no torch - set PYTHON to the interpreter that has it"

toy=()
minutes=10
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "No CUDA GPU: this is a rehearsal on the CPU at toy size. Its figures mean nothing."
    export GPU_SUITE_REHEARSAL=1
    toy=(--toy --steps 1 --modes eager)
    minutes=30 # 16 bits are emulated, and other work may be running beside a rehearsal
fi

# Every part is given its time, and what is done by then is reported: 10 + 12 minutes, and some for compiling at the end.
code=0
for part in $parts; do
    if [ "$part" = tests ]; then
        timeout --signal INT "${minutes}m" "$python" -m pytest tests/gpu -m '' -o timeout=600 --junitxml "$out/tests.xml" -p no:cacheprovider || code=1
    else
        timeout --signal INT 14m "$python" benchmarks/gpu.py --minutes 12 --json "$out/benchmark.json" "${toy[@]}" "$@" ||
            code=1
    fi
done
"$python" scripts/gpu_suite_report.py "$out" || code=1
exit "$code"
