#!/usr/bin/env bash
# From a fresh machine to a trained model: sets up the environment, then trains with config.yaml, going on where an
# earlier run stopped. Every flag goes through to the trainer, which makes the sample corpus where no text is named.
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

# sha256 of the shipped config.yaml: only that one is ever replaced by a preset. A test keeps this line current.
SHIPPED_CONFIG=017fc589dfbf0a043aaa5c15f2d360230b7b06764c84d59f7b4fa27a38331b5e

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
    from smollm2.formatting import format_estimate
    from smollm2.plan.arithmetic import estimate_here
    seconds = estimate_here(config)
    if seconds > 3600:
        print(format_estimate(seconds))
'
if [ -z "$chooses_config" ]; then
    cost=$("$python" -c "$ESTIMATE" "$SHIPPED_CONFIG" </dev/null)
    if [ -n "$cost" ]; then
        echo "config.yaml as shipped would take about $cost here, so this run takes the preset nano: some minutes."
        echo "For the full one: ./run_training.sh --config config.yaml"
        set -- --preset nano "$@"
    fi
fi

# One process per GPU that this shell may see; NUM_PROCESSES overrides it, also on a CPU.
count_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi -L </dev/null 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}
processes=${NUM_PROCESSES:-$(count_gpus)}
case $processes in
    *[!0-9]*) echo "NUM_PROCESSES is \"$processes\"; it must be a number of processes, such as 2." >&2; exit 2 ;;
esac

# The trainer takes this process over: signals and the exit code are its own, with nothing between. Several processes
# need torchrun above them, which always returns 1: the code that counts is in the file that rank 0 writes.
exec "$python" -c '
import os, signal, subprocess, sys, tempfile
from smollm2.cli import main as cli

def launch(processes, arguments):
    code = cli.check_config(arguments)
    if code:
        return code
    signals = ["SIGTERM", "SIGINT", "SIGUSR1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    torchrun += ["--signals_to_handle", ",".join(signals), "train.py", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        code_file = os.path.join(folder, "exit_code")
        threads = str(max(1, (os.cpu_count() or 1) // int(processes)))  # torchrun would give each process one
        environment = {"OMP_NUM_THREADS": threads, **os.environ, cli.EXIT_CODE_FILE: code_file}
        # In a session of its own: Ctrl-C reaches it once, from here.
        ranks = subprocess.Popen(torchrun, env=environment, start_new_session=True)
        for name in signals:
            signal.signal(getattr(signal, name), lambda number, frame: ranks.send_signal(number))
        code = ranks.wait()
        if os.path.exists(code_file):
            return int(open(code_file).read())
        return 128 - code if code < 0 else code

sys.argv[0] = "train.py"  # how a person goes on after a stop
processes = sys.argv.pop(1)
arguments = ["train", *sys.argv[1:]]
code = launch(processes, arguments[1:]) if int(processes) > 1 else cli.main(arguments)
if code == 0:
    print("""
Next:
  train longer         the same command with a higher --train_steps
  a text of your own   ./run_training.sh --input_file TEXT --save_dir FOLDER
  run the tests        ./run_tests.sh""")
sys.exit(code)
' "$processes" "$@"
