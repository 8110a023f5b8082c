#!/usr/bin/env bash
# From a fresh machine to a trained model: sets up the environment, then trains with config.yaml, going on where an
# earlier run stopped. Every flag goes through to the trainer, which makes the sample corpus where no text is named.
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

# sha256 of the shipped config.yaml: only that one is ever replaced by a preset. A test keeps this line current.
SHIPPED_CONFIG=f054bf1b920ebfc7f8e91133774b0c773c38db5962c6214b7292c40a8216610a

# Standard input may be the user's text: it is for the trainer alone.
scripts/environment.sh </dev/null
python=.venv/bin/python
[ -e "$python" ] || python=.venv/Scripts/python.exe

chooses_start="" chooses_config=""
for argument in "$@"; do
    case $argument in
        --checkpoint_path | --checkpoint_path=* | --resume | --resume=*) chooses_start=yes ;;
        --config | --config=* | --preset | --preset=* | -h | --help) chooses_config=yes ;;
    esac
done
[ -n "$chooses_start" ] || set -- --resume auto "$@"

# Prints what the shipped config would cost here where that is over an hour, else nothing. Flags do not count: the same
# folder must get the same model whatever they say.
ESTIMATE='
import hashlib, sys
from pathlib import Path
config = Path("config.yaml")
if config.is_file() and hashlib.sha256(config.read_bytes()).hexdigest() == sys.argv[1]:
    from smollm2.plan import estimate_here, show_seconds
    seconds = estimate_here(config)
    if seconds > 3600:
        print(show_seconds(seconds))
'
if [ -z "$chooses_config" ]; then
    cost=$("$python" -c "$ESTIMATE" "$SHIPPED_CONFIG" </dev/null)
    if [ -n "$cost" ]; then
        echo "config.yaml as shipped would take about $cost here, so this run takes the preset nano: some minutes."
        echo "For the full one: ./run_training.sh --config config.yaml"
        set -- --preset nano "$@"
    fi
fi

# The trainer takes this process over: signals and the exit code are its own, with nothing between.
exec "$python" -c '
import sys
from smollm2.cli import main
sys.argv[0] = "train.py"  # how a person goes on after a stop
code = main(["train", *sys.argv[1:]])
if code == 0:
    print("""
Next:
  train longer         the same command with a higher --train_steps
  a text of your own   ./run_training.sh --input_file TEXT --save_dir FOLDER
  run the tests        ./run_tests.sh""")
sys.exit(code)
' "$@"
