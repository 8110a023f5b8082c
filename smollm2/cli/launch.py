"""The program behind run_training.sh: it chooses the config and the number of processes, trains, and prints next steps.

If no flag chooses a config, the preset nano replaces the shipped config.yaml when a run of that would take over an hour
here. This is decided by the table of `smollm2 plan`, not by timing, so that a machine always trains the same model.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import FrameType

from smollm2.cli import main as cli
from smollm2.cli.run_flags import load_run_config
from smollm2.cli.train import LAUNCHER
from smollm2.config.reading import load_config
from smollm2.errors import EXIT_CODE_FILE, ConfigError, Smollm2Error
from smollm2.formatting import format_estimate
from smollm2.plan.machine import Machine, count_cores, find_machine
from smollm2.plan.throughput import estimate_duration, find_throughput, table_throughput
from smollm2.runtime.commands import CALLER, shown_script

SHIPPED_CONFIG = "b631f06d18365a34f27d8bd0093095007e2f710921f04e22668c0d0428561892"
"""SHA-256 of config.yaml as shipped, the only config that is ever replaced. A test checks that it is current."""

LONGEST_SECONDS = 3600

STARTS = ("--checkpoint_path", "--resume")
CONFIGS = ("--config", "--preset")
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


def main(argv: Sequence[str]) -> int:
    """Train with the flags of run_training.sh; return the exit code. `argv[0]` is the folder it was called from."""
    os.environ[CALLER], *given = argv
    try:
        processes = count_processes(os.environ)
        flags = given if has_flag(given, STARTS) else ["--resume", "auto", *given]
        if not has_flag(given, CONFIGS) and not {"-h", "--help"} & set(given):
            if code := cli.check_config(flags):
                return code
            flags = choose_config(flags, find_machine(os.environ), processes)
    except Smollm2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    sys.argv = ["train.py", *flags]
    os.environ[LAUNCHER] = describe_launcher(os.environ)
    code = train_together(processes, flags) if processes > 1 else cli.main(["train", *flags])
    if code == 0 and not {"-h", "--help"} & set(given):
        print(describe_next_steps())
    return code


def describe_launcher(environment: Mapping[str, str]) -> str:
    """Return the command that the user typed, without its flags."""
    script = shown_script(Path("run_training.sh"))
    return f"NUM_PROCESSES={environment['NUM_PROCESSES']} {script}" if environment.get("NUM_PROCESSES") else script


def has_flag(words: Sequence[str], names: Sequence[str]) -> bool:
    """Return whether one of the flags is given, as `--flag value` or `--flag=value`."""
    return any(word.partition("=")[0] in names for word in words)


def count_processes(environment: Mapping[str, str]) -> int:
    """Return NUM_PROCESSES, by default the number of visible GPUs. Raise ConfigError if it is not a number."""
    text = environment.get("NUM_PROCESSES")
    if not text:
        return max(1, find_machine(environment).gpus)
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError("NUM_PROCESSES", f'"{text}" is not a positive whole number', "use a number such as 2")
    return int(text)


def choose_config(flags: list[str], machine: Machine, processes: int) -> list[str]:
    """Return the flags, with `--preset nano` if the shipped config.yaml would take over an hour. Print the choice."""
    path = Path("config.yaml")
    if not path.is_file() or sha256(path.read_bytes()).hexdigest() != SHIPPED_CONFIG:
        return flags
    if not machine.is_cpu:  # on a CPU, the processes share its cores
        machine = replace(machine, devices=processes)
    shipped = load_config(path)  # without the flags, so that they do not change the choice of model
    seconds = estimate_duration(shipped, machine, table_throughput(shipped, machine)).total
    if seconds <= LONGEST_SECONDS:
        return flags
    flags = ["--preset", "nano", *flags]
    print(f"config.yaml would take about {format_estimate(seconds)} on this machine,")
    print(f"so this run uses the small `nano` preset (about {format_estimate(estimate_here(flags, machine))}).")
    script = shown_script(Path("run_training.sh"))
    print(f"To train with config.yaml anyway: {script} --config config.yaml", flush=True)
    return flags


def estimate_here(flags: Sequence[str], machine: Machine) -> float:
    """Return the estimated seconds of a run with these flags, from an earlier run or a timing of matrix products."""
    config = load_run_config(cli.build_parser().parse_args(["train", *flags]))[0]
    throughput = find_throughput(config, machine)
    if machine.is_cpu and not throughput.measured:
        import torch  # training needs it anyway

        from smollm2.plan.arithmetic import needs_float32
        from smollm2.runtime.throughput import measure_products

        dtype = torch.float32 if needs_float32(config, machine.device) else torch.bfloat16
        throughput = find_throughput(config, machine, measure_products(dtype))
    return estimate_duration(config, machine, throughput).total


def train_together(processes: int, flags: Sequence[str]) -> int:
    """Train in several processes; return rank 0's exit code.

    torchrun returns 1 for every failure, so rank 0 writes its code to a file, and the config is checked first.
    """
    if code := cli.check_config(flags):
        return code
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    torchrun += ["--signals_to_handle", ",".join(SIGNALS), "train.py", *flags]
    with tempfile.TemporaryDirectory() as folder:
        code_file = Path(folder) / "exit_code"
        threads = str(max(1, count_cores() // processes))  # torchrun's default is one per process
        environment = {"OMP_NUM_THREADS": threads, **os.environ, EXIT_CODE_FILE: str(code_file)}
        # In a separate session, so that Ctrl-C reaches the ranks only once, forwarded by this process.
        ranks = subprocess.Popen(torchrun, env=environment, start_new_session=True)

        def pass_on(number: int, frame: FrameType | None) -> None:
            ranks.send_signal(number)

        for name in SIGNALS:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), pass_on)
        code = ranks.wait()
        if code_file.exists():
            return int(code_file.read_text())
        return 128 - code if code < 0 else code


def describe_next_steps() -> str:
    """Return suggestions for what to do after a run; its summary has already shown how to generate text."""
    train, test = (shown_script(Path(name)) for name in ("run_training.sh", "run_tests.sh"))
    rows = {
        "train longer": f"{train} --train_steps N, with a higher N than before",
        "use your own text": f"{train} --input_file TEXT --save_dir FOLDER",
        "run the tests": test,
    }
    return "\n".join(["", "Next:", *(f"  {what:<19}{how}" for what, how in rows.items())])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
