"""Estimate how long a step and a run take on a machine, from a table or from measurements of earlier runs there.

A run records its throughput in the cache folder (`throughput.json`). Without a record, the table below is used. Once
torch is loaded, the table can be corrected for a faster or slower CPU by `products`, the FLOP/s of matrix products in a
short measurement. Records and measurements never affect what a run computes.
"""

import contextlib
import datetime
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from smollm2.config.schema import Config
from smollm2.formatting import format_estimate
from smollm2.plan.arithmetic import flops_per_token, has_bf16, muon_flops, needs_float32
from smollm2.plan.machine import Machine
from smollm2.storage.atomic import write_atomically


@dataclass(frozen=True)
class CpuSpeed:
    """The training speed of one core of a CPU class."""

    float32: float  # FLOP/s of matrix products, as measured by measure_products
    bf16: float
    seconds_per_number: float  # all other work, for each value of the residual stream in each layer
    seconds_per_block: float  # fixed cost of a block per micro-batch of any size; not per core


CPU_SPEEDS = {
    "cpu-avx2": CpuSpeed(64e9, 0.6e9, 150e-9, 10e-3),  # without bf16 units: emulated
    "cpu-avx512": CpuSpeed(54e9, 0.5e9, 125e-9, 4.8e-3),
    "cpu-bf16": CpuSpeed(86e9, 190e9, 125e-9, 3e-3),  # AVX-512 with bf16
    "cpu-amx": CpuSpeed(100e9, 400e9, 125e-9, 3e-3),
    "cpu-float32": CpuSpeed(30e9, 0.3e9, 125e-9, 10e-3),  # any other
}
"""Calibrated on two idle cores, so that the estimates match measured times of whole steps:

- cpu-avx2: AMD EPYC (Zen 3, no bf16 units), torch 2.13, 2026-11-25. Matrix products reached 128 GFLOP/s. Nano ran at
  9,000 tokens/s (AdamW) on one day and at 6,300 (Muon) on the next, with the same speed of matrix products; micro ran
  at 1,120 (3.67 s per step). Micro's forward and backward passes took 2.5 s per step on the first day. The 12M model of
  benchmarks/train_speed.py ran at 1,611 tokens/s.
- cpu-bf16: AMD EPYC with avx512_bf16, torch 2.13, 2026-11-24. Nano ran at 15,300 tokens/s, micro at 3,050, and the
  768-wide model with gradient checkpointing at 263; in float32, the 12M model ran at 1,756.
- cpu-avx512: Intel Xeon at 2.5 GHz without bf16 units, torch 2.13, 2026-11-27. Nano (Muon) ran at 4,800 to 9,400 tokens/s,
  and its 750 steps took 217 s with all that a run does besides; the row is the record of that run. bf16 is a guess.
- cpu-amx, cpu-float32: guesses, never measured."""

GPU_FLOPS = {"H200": 280e12, "H100": 250e12, "A100": 100e12, "L40S": 80e12, "RTX 4090": 60e12, "L4": 25e12}
GPU_FLOPS |= {"T4": 15e12, "mps": 2e12}
"""Estimated training FLOP/s of a GPU whose name contains the key; `mps` is Apple silicon."""

OTHER_GPU_FLOPS = 30e12
GPU_SECONDS_PER_BLOCK = 2e-3
"""The fixed cost of a block per micro-batch of any size, in seconds; on a GPU it overlaps with matrix products."""

SAMPLE_SECONDS_PER_BLOCK = 1e-3
"""The seconds per block to generate one token of a sample; nano generated 250 tokens/s on 2026-11-25."""

COMPILE_SECONDS = 60.0
"""The longest compilation time observed at a first step, in seconds, on two cores."""

COMPILE_GAIN_CPU = 1.14
"""The speedup of compiled blocks in bf16 on a CPU (benchmarks/README.md); in float32 it is 1.03, within the noise."""

COMPILE_GAIN_GPU = 1.16
"""The speedup on a GPU, the lower of two published values: torchtitan's 1.16 (8B parameters), nanoGPT's 1.85 (A100)."""

SHARE_BESIDES = 0.05
"""The time for diagnostics, landscape, reports and saves as a fraction of step time (nano and micro, 2026-11-25)."""

RECORDS = "throughput.json"
KEPT_RECORDS = 5
"""The number of latest records kept per key: if a machine becomes slower, estimates follow after this many runs."""

MAX_DEVIATION = 1.5
"""A correction is reported if measured and announced step times differ by more than this factor."""


@dataclass(frozen=True)
class Throughput:
    """The throughput that a machine reaches in training."""

    flops: float  # FLOP/s of matrix products
    seconds_per_block: float  # fixed cost of a block per micro-batch of any size
    measured: str = ""  # the date on which a run reached it; empty if it comes from the table
    is_scaled: bool = False  # whether the table was corrected by a measurement of matrix products


@dataclass(frozen=True)
class Duration:
    """How long a run takes."""

    step: float  # seconds of one step
    besides: float  # seconds in the whole run for validation, samples, diagnostics and saves
    steps: int

    def of(self, steps: int) -> float:
        """Return the seconds that `steps` steps take, including their share of the other work."""
        return steps * (self.step + self.besides / self.steps)

    @property
    def total(self) -> float:
        """The seconds that the whole run takes."""
        return self.of(self.steps)


def estimate_duration(config: Config, machine: Machine, throughput: Throughput | None = None) -> Duration:
    """Return how long the run takes at this throughput, by default the table's."""
    t = config.training
    throughput = throughput or table_throughput(config, machine)
    step = estimate_step(config, machine, throughput)
    tokens = config.global_batch_size * t.sequence_length
    forward = step / 3 / tokens
    validations = t.train_steps // t.eval_interval + 1 if t.eval_interval else 1
    samples = t.train_steps // t.sample_interval + 1 if t.sample_interval else 1
    sampled = samples * (len(t.sample_prompts) + 1) * t.sample_tokens
    besides = validations * t.eval_windows * t.sequence_length * forward
    besides += sampled * config.model.num_hidden_layers * SAMPLE_SECONDS_PER_BLOCK
    return Duration(step, besides + SHARE_BESIDES * step * t.train_steps, t.train_steps)


def estimate_step(config: Config, machine: Machine, throughput: Throughput) -> float:
    """Return the seconds of one step at this throughput."""
    products, blocks = split_step(config, machine, throughput)
    return products + blocks if machine.is_cpu else max(products, blocks)


def split_step(config: Config, machine: Machine, throughput: Throughput) -> tuple[float, float]:
    """Return a step's time in seconds as two parts: one proportional to its FLOPs, and one independent of them."""
    m, t = config.model, config.training
    tokens = config.global_batch_size * t.sequence_length / machine.devices
    flops: float = flops_per_token(m, t.sequence_length)
    if machine.is_cpu:  # all other work, converted to FLOPs that take as long
        speed = CPU_SPEEDS[machine.device]
        flops += m.num_hidden_layers * m.hidden_size * speed.seconds_per_number * core_flops(config, machine)
    work = tokens * flops * (4 / 3 if t.gradient_checkpointing else 1) + optimizer_work(config, machine)
    micro_batches = max(1.0, t.gradient_accumulation_steps / machine.devices)
    return work / throughput.flops, micro_batches * m.num_hidden_layers * throughput.seconds_per_block


def optimizer_work(config: Config, machine: Machine) -> float:
    """Return the optimizer's work as equivalent FLOPs in the training precision; AdamW's is negligible."""
    if config.training.optimizer != "muon":
        return 0.0
    flops = float(muon_flops(config.model, machine.device))
    if machine.is_cpu:  # Muon uses the fastest precision, whatever the training precision
        speed = CPU_SPEEDS[machine.device]
        flops *= core_flops(config, machine) / (speed.bf16 if has_bf16(machine.device) else speed.float32)
    return flops


def table_throughput(config: Config, machine: Machine) -> Throughput:
    """Return the throughput of a machine according to the table."""
    if machine.is_cpu:
        return Throughput(core_flops(config, machine) * machine.cores, CPU_SPEEDS[machine.device].seconds_per_block)
    flops = next((flops for word, flops in GPU_FLOPS.items() if word in machine.device), OTHER_GPU_FLOPS)
    slower = 8 if config.training.precision == "float32" and machine.device != "mps" else 1
    return Throughput(flops / slower, GPU_SECONDS_PER_BLOCK)


def core_flops(config: Config, machine: Machine) -> float:
    """Return the FLOP/s of matrix products on one core in this run's precision, according to the table."""
    speed = CPU_SPEEDS[machine.device]
    return speed.float32 if needs_float32(config, machine.device) else speed.bf16


def find_throughput(config: Config, machine: Machine, products: float | None = None) -> Throughput:
    """Return the fastest recent record, or else the table's throughput, scaled to `products` if given.

    The fastest record is the best estimate, because other programs can only slow a run down. `products` is the FLOP/s
    that all cores of a CPU currently reach in this run's precision.
    """
    records = read_records(Path(config.data.cache_dir) / RECORDS).get(record_key(config, machine))
    if records:
        return min(records, key=lambda record: estimate_step(config, machine, record))
    table = table_throughput(config, machine)
    if products is None or not machine.is_cpu:
        return table
    factor = products / table.flops
    return Throughput(products, table.seconds_per_block / factor, is_scaled=True)


def measured_throughput(config: Config, machine: Machine, seconds: float) -> Throughput:
    """Return the throughput at which a step of `config` takes `seconds`, by scaling the table's throughput.

    A run too small to be limited by matrix products gives no information about their speed.
    """
    table = table_throughput(config, machine)
    products, blocks = split_step(config, machine, table)
    factor = seconds / estimate_step(config, machine, table)
    flops = table.flops / factor if products > blocks else table.flops
    return Throughput(flops, table.seconds_per_block * factor, datetime.datetime.now().astimezone().date().isoformat())


def record_throughput(config: Config, machine: Machine, seconds: float) -> None:
    """Record in the cache folder that a step of `config` took `seconds`. Raise OSError or ResourceError."""
    path, key = Path(config.data.cache_dir) / RECORDS, record_key(config, machine)
    flops, found = table_throughput(config, machine).flops, measured_throughput(config, machine, seconds)
    records = read_records(path)
    of_larger_runs = [record for record in records.get(key, []) if record.flops != flops]
    if found.flops == flops and of_larger_runs:  # a small run; measurements of larger runs are better
        return
    earlier = records.get(key, []) if found.flops == flops else of_larger_runs
    records[key] = [*earlier, found][-KEPT_RECORDS:]
    text = json.dumps({key: [asdict(record) for record in kept] for key, kept in records.items()}, indent=1)
    write_atomically(path, f"{text}\n".encode())


def read_records(path: Path) -> dict[str, list[Throughput]]:
    """Return the records in a file; skip invalid ones, because a cache may come from any version."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    records: dict[str, list[Throughput]] = {}
    for key, values in found.items() if isinstance(found, dict) else ():
        for value in values if isinstance(values, list) else ():
            with contextlib.suppress(TypeError, ValueError, KeyError):
                record = Throughput(float(value["flops"]), float(value["seconds_per_block"]), str(value["measured"]))
                if 0 < record.flops < math.inf and 0 < record.seconds_per_block < math.inf:
                    records.setdefault(key, []).append(record)
    return records


def record_key(config: Config, machine: Machine) -> str:
    """Return the key of a record: the conditions for which it is valid."""
    t = config.training
    precision = t.precision
    if precision == "auto":
        precision = "float32" if needs_float32(config, machine.device) else "bf16"
    parts = [machine.device, precision, t.optimizer, f"{machine.cores} cores"]
    # On a CPU compilation changes little, so a short run's record can also be used to plan a long run.
    return ", ".join([*parts, "compiled"] if not machine.is_cpu and is_compiled(config, machine) else parts)


def is_compiled(config: Config, machine: Machine) -> bool:
    """Return whether the blocks are compiled; `auto` depends only on the table, so identical machines agree."""
    setting = config.training.compile
    if setting != "auto":
        return setting
    if machine.device == "mps" or (machine.is_cpu and needs_float32(config, machine.device)):
        return False
    gain = COMPILE_GAIN_CPU if machine.is_cpu else COMPILE_GAIN_GPU
    seconds = estimate_duration(config, machine).total
    return seconds - seconds / gain > COMPILE_SECONDS


def correct_duration(announced: Duration, step_seconds: Sequence[float], steps_left: int) -> Duration | None:
    """Return the corrected duration if steps take much more or less time than announced, else None.

    A machine counts as slow only if even the fastest tenth of its steps is slow, because compilation and other programs
    can slow steps down. There is no correction if both estimates are under a minute.
    """
    fast, step = sorted(step_seconds)[len(step_seconds) // 10], statistics.median(step_seconds)
    if fast < MAX_DEVIATION * announced.step and step > announced.step / MAX_DEVIATION:
        return None
    corrected = replace(announced, step=step, besides=announced.besides * step / announced.step)
    return corrected if max(corrected.of(steps_left), announced.of(steps_left)) >= 60 else None


def describe_correction(announced: Duration, corrected: Duration, steps_left: int) -> str:
    """Return one line with the corrected time of the remaining steps."""
    factor = corrected.step / announced.step
    speed = f"{factor:.1f} times slower" if factor > 1 else f"{1 / factor:.1f} times faster"
    return (
        f"CORRECTED TIME: about {format_estimate(corrected.of(steps_left))} left, not "
        f"{format_estimate(announced.of(steps_left))}: this machine is {speed} than estimated"
    )
