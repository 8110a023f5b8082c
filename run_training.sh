#!/usr/bin/env bash
# From a fresh machine to a trained model: sets up the environment, then trains with config.yaml and resumes an earlier
# run. All flags are those of train.py. If no text is named and input.txt is missing, the sample corpus is made.
set -euo pipefail
unset CDPATH
caller=$PWD
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

# Standard input may be the user's text, which is for the trainer.
scripts/environment.sh </dev/null
python=.venv/bin/python
[ -e "$python" ] || python=.venv/Scripts/python.exe

# exec: signals and the exit code are those of the trainer.
exec "$python" -m smollm2.cli.launch "$caller" "$@"
