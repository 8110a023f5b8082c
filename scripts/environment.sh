#!/usr/bin/env bash
# Makes .venv beside this project and installs the package into it, editable, with [wandb]; --dev adds what the tests
# need. A second call finds its stamp and ends at once. The stamp is taken away first and written last, so that an
# interrupted call is simply made again.
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

fail() {
    local code=$1
    shift
    printf 'scripts/environment.sh: %s\n' "$*" >&2
    exit "$code"
}

case "$*" in
    "") extras=wandb ;;
    --dev) extras=wandb,dev ;;
    *) fail 2 "\"$*\" is not an option - give --dev for the tools of the tests, or nothing" ;;
esac
stamp=.venv/.installed

set_environment_python() {
    environment_python=.venv/bin/python
    [ -e "$environment_python" ] || [ ! -e .venv/Scripts/python.exe ] || environment_python=.venv/Scripts/python.exe
}

# What an installation depends on: the two files, this folder (an editable install names it) and the Python.
fingerprint() {
    local version
    version=$("$environment_python" -c 'import sys; print(sys.version)' 2>/dev/null) || version=none
    printf '%s\n' "$PWD" "$version" | cat - pyproject.toml constraints.txt | cksum
}

# Everything that [wandb] needs is there where [wandb,dev] was installed, so a plain call is content with both.
is_current() {
    local present now
    present=$(cat "$stamp" 2>/dev/null) || return 1
    set_environment_python
    now=$(fingerprint)
    [ "$present" = "$now wandb,dev" ] || [ "$present" = "$now $extras" ]
}

# .venv's own Python where that works, else one that can make a .venv. A name on the PATH may be a launcher without a
# Python behind it, so each is tried.
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
    [ -n "$found" ] || fail 2 "no Python 3.11 or newer was found on the PATH - install one, then run this again"
    fail 2 "$found cannot make an environment: its ensurepip is missing - on Debian or Ubuntu install the package" \
        "python3-venv (or $found-venv), then run this again"
}

# Two calls at once would write into one another's .venv. The lock goes with the process, whatever ends it.
wait_for_our_turn() {
    exec 9>.venv/.lock
    "$python" -c '
try:
    import fcntl
except ImportError:  # Windows
    raise SystemExit
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("Another scripts/environment.sh is at work here; waiting for it.", flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)
'
}

has_torch() {
    set_environment_python
    "$environment_python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null
}

say_what_comes() {
    if has_torch; then
        echo "Bringing .venv up to date for [$extras]: torch is there, the rest is at most 0.3 GB to download."
        return
    fi
    echo "Setting up .venv with $("$python" -V) for [$extras]; this takes some minutes, once."
    if [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null; then
        echo "torch with CUDA is several GB to download."
    elif [ "$(uname -s) $(uname -m)" = "Linux x86_64" ]; then
        echo "No NVIDIA driver was found. By itself pip takes torch's CUDA build all the same: several GB to download."
        echo "README.md tells how to point pip to PyTorch's CPU wheels: about 0.2 GB to download, 1.3 GB installed."
    else
        echo "No NVIDIA driver was found. torch and the rest are about 0.3 GB to download, 1.5 GB installed."
    fi
    echo "What pip does stands in .venv/install.log."
}

check_disk() {
    local free need=3000
    ! has_torch || need=500
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1000) }')
    [ "${free:-0}" -ge "$need" ] ||
        fail 6 "$PWD - ${free:-0} MB are free and about $need MB are needed - free some, then run this again"
}

make_environment() {
    [ "$python" != "$environment_python" ] || return 0
    # An interrupted call, or another tool, leaves a Python without pip.
    ! "$environment_python" -m ensurepip >/dev/null 2>&1 || return 0
    # What is left of an environment whose Python is gone would get in the way.
    find .venv -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +
    "$python" -m venv .venv
    set_environment_python
}

install_package() {
    local code=0
    "$environment_python" -m pip install --quiet --disable-pip-version-check --no-input --log .venv/install.log \
        --constraint constraints.txt --editable ".[$extras]" </dev/null || code=$?
    [ "$code" = 0 ] || fail "$code" "pip could not install the package (its words stand above, the whole in" \
        "$PWD/.venv/install.log) - mend that, then run this again"
}

is_current && exit
find_python
mkdir -p .venv 2>/dev/null && [ -w .venv ] || fail 6 "$PWD/.venv cannot be written - give yourself the right to, then run this again"
wait_for_our_turn
is_current && exit # the other call did our work
rm -f "$stamp"
check_disk
say_what_comes
make_environment
install_package
echo "$(fingerprint) $extras" >"$stamp.new"
mv "$stamp.new" "$stamp"
echo "The environment is ready: .venv"
