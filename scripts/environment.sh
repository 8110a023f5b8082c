#!/usr/bin/env bash
# Makes .venv in this project and installs the package into it, editable, with [wandb]; --dev adds what the tests need.
# A stamp file records what is installed: a second call finds it and returns at once. It is removed first and written
# last, so that an interrupted call can simply be repeated.
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# fail EXIT_CODE WHERE WHAT ADVICE: the layout of smollm2/errors.py.
fail() {
    printf 'error: %s: %s. %s.\n' "$2" "$3" "$4" >&2
    exit "$1"
}

case "$*" in
    "") extras=wandb ;;
    --dev) extras=wandb,dev ;;
    *) fail 2 scripts/environment.sh "unknown option \"$*\"" "Use --dev for the test tools, or no option" ;;
esac
stamp=.venv/.installed

set_environment_python() {
    environment_python=.venv/bin/python
    [ -e "$environment_python" ] || [ ! -e .venv/Scripts/python.exe ] || environment_python=.venv/Scripts/python.exe
}

# Everything that an installation depends on: two files, this folder (an editable install contains its path), the Python.
fingerprint() {
    local version
    version=$("$environment_python" -c 'import sys; print(sys.version)' 2>/dev/null) || version=none
    printf '%s\n' "$PWD" "$version" | cat - pyproject.toml constraints.txt | cksum
}

# [wandb,dev] contains [wandb], so a plain call accepts both.
is_current() {
    local present now
    present=$(cat "$stamp" 2>/dev/null) || return 1
    set_environment_python
    now=$(fingerprint)
    [ "$present" = "$now wandb,dev" ] || [ "$present" = "$now $extras" ]
}

# Find .venv's own Python if it works, else one that can make a .venv. Each is tried: a name on the PATH may be a launcher
# without a Python.
find_python() {
    local name code found=""
    set_environment_python
    python=$environment_python
    ! "$python" -m pip --version >/dev/null 2>&1 || return 0
    for name in python3.13 python3.12 python3.11 python3 python; do
        code=0
        "$name" -c '
import sys
if sys.version_info < (3, 11): sys.exit(1)
try: import ensurepip, venv
except ImportError: sys.exit(9)
' >/dev/null 2>&1 || code=$?
        case $code in
            0) python=$name && return ;;
            9) found=${found:-$name} ;;
        esac
    done
    [ -n "$found" ] || fail 2 PATH "no Python 3.11 or newer was found" "Install one, then run this again"
    fail 2 "$found" "cannot make an environment, because ensurepip is missing" \
        "On Debian or Ubuntu install the package python3-venv (or $found-venv), then run this again"
}

# Two calls at the same time would write to the same .venv. The lock is released when this process ends, however it ends.
wait_for_lock() {
    exec 9>.venv/.lock
    "$python" -c '
try:
    import fcntl
except ImportError:  # Windows
    raise SystemExit
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("Waiting for another scripts/environment.sh to finish.", flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)
'
}

has_torch() {
    set_environment_python
    "$environment_python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null
}

announce() {
    if has_torch; then
        echo "Updating .venv for [$extras]: torch is installed; the rest is at most 0.3 GB to download."
        return
    fi
    echo "Setting up .venv with $("$python" -V) for [$extras]. This takes a few minutes, once."
    if [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null; then
        echo "torch with CUDA is a download of several GB."
    elif [ "$(uname -s) $(uname -m)" = "Linux x86_64" ]; then
        echo "No NVIDIA driver was found, but pip installs torch's CUDA build by default: a download of several GB."
        echo "README.md shows how to install PyTorch's CPU build instead: a download of 0.2 GB, 1.3 GB installed."
    else
        echo "No NVIDIA driver was found. torch and the rest are a download of about 0.3 GB, 1.5 GB installed."
    fi
    echo "pip's log is .venv/install.log."
}

check_disk() {
    local free need=3000
    ! has_torch || need=500
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1000) }')
    [ "${free:-0}" -ge "$need" ] ||
        fail 6 "$PWD" "${free:-0} MB are free and about $need MB are needed" "Free some space, then run this again"
}

make_environment() {
    [ "$python" != "$environment_python" ] || return 0
    # An interrupted call, or another tool, may leave a Python without pip.
    ! "$environment_python" -m ensurepip >/dev/null 2>&1 || return 0
    # Files of an environment whose Python was removed would get in the way.
    find .venv -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +
    "$python" -m venv .venv
    set_environment_python
}

install_package() {
    local code=0
    "$environment_python" -m pip install --quiet --disable-pip-version-check --no-input --log .venv/install.log \
        --constraint constraints.txt --editable ".[$extras]" </dev/null || code=$?
    [ "$code" = 0 ] || fail "$code" pip "the package could not be installed (errors above, full log in $PWD/.venv/install.log)" \
        "Fix the cause, then run this again"
    rm -f .venv/install.log # tens of MB that nobody needs after a success
}

is_current && exit
find_python
mkdir -p .venv 2>/dev/null && [ -w .venv ] || fail 6 "$PWD/.venv" "cannot be written" "Make it writable, then run this again"
wait_for_lock
is_current && exit # the other call has installed it
rm -f "$stamp"
check_disk
announce
make_environment
install_package
echo "$(fingerprint) $extras" >"$stamp.new"
mv "$stamp.new" "$stamp"
echo "The environment is ready: .venv"
