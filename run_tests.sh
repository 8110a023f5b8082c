#!/usr/bin/env bash
# Set up what the tests need, then run them; any argument goes to pytest. Two workers, unless -n says otherwise.
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
scripts/environment.sh --dev
python=.venv/bin/python
[ -e "$python" ] || python=.venv/Scripts/python.exe

workers=(-n 2 --dist loadfile) # a file's tests share what they set up
for argument in "$@"; do
    case $argument in -n* | --numprocesses* | --pdb) workers=(-n 0) ;; esac
done
# The models of the tests are so small that a second thread only waits, and two workers with two threads each wait for one
# another. On two AVX2 cores this is the difference between 10 minutes and 6.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Without compiled files, each process that the tests start compiles the package anew.
unset PYTHONDONTWRITEBYTECODE
exec "$python" -m pytest "${workers[@]}" "$@"
