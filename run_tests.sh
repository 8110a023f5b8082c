#!/usr/bin/env bash
# Sets up what the tests need, then runs them; any argument goes to pytest.
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
scripts/environment.sh --dev
python=.venv/bin/python
[ -e "$python" ] || python=.venv/Scripts/python.exe
exec "$python" -m pytest "$@"
