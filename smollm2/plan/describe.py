"""Make the plan of a run, and the table of it that `smollm2 plan` prints."""

from dataclasses import asdict, dataclass

from smollm2.config.schema import Config
from smollm2.formatting import format_bytes, format_estimate, format_step_time
from smollm2.plan.arithmetic import (
    Corpus,
    Disk,
    Memory,
    count_non_embedding,
    count_parameters,
    estimate_disk,
    estimate_memory,
    find_corpus,
    flops_per_token,
)
from smollm2.plan.machine import Machine
from smollm2.plan.throughput import Duration, Throughput, estimate_duration, find_throughput, table_throughput

CARDS = {"H200": 141, "H100": 80, "A100": 80, "L40S": 48, "RTX 4090": 24, "L4": 24, "T4": 16}
"""Memory of commonly rented or owned GPUs, in GB."""

CPU_NAMES = {
    "cpu-avx2": "CPU with AVX2",
    "cpu-avx512": "CPU with AVX-512",
    "cpu-bf16": "CPU with AVX-512 and bf16",
    "cpu-amx": "CPU with AMX",
    "cpu-float32": "CPU",
    "mps": "Apple GPU",
}


@dataclass(frozen=True)
class Plan:
    """What a run needs; memory is per device."""

    parameters: int
    flops_per_token: int
    tokens_per_step: int
    memory: Memory
    disk: Disk
    duration: Duration
    throughput: Throughput


def make_plan(config: Config, machine: Machine, products: float | None = None) -> Plan:
    """Return the plan of a run on a machine; `products` is as in `find_throughput`."""
    throughput = find_throughput(config, machine, products)
    return Plan(
        parameters=count_parameters(config.model),
        flops_per_token=flops_per_token(config.model, config.training.sequence_length),
        tokens_per_step=config.global_batch_size * config.training.sequence_length,
        memory=estimate_memory(config, machine.device),
        disk=estimate_disk(config),
        duration=estimate_duration(config, machine, throughput),
        throughput=throughput,
    )


def describe_machine(machine: Machine) -> str:
    """Return a description such as `2 cores of a CPU with AVX2` or `one NVIDIA H100`."""
    name = CPU_NAMES.get(machine.device, machine.device)
    if machine.is_cpu:
        return f"1 core of a {name}" if machine.cores == 1 else f"{machine.cores} cores of a {name}"
    return f"one {name}" if machine.devices == 1 else f"{machine.devices} x {name}"


def describe_origin(throughput: Throughput) -> str:
    """Return what a time estimate is based on."""
    if throughput.measured:
        return f"from a run on this machine on {throughput.measured}"
    return "estimated from a short measurement" if throughput.is_scaled else "estimated from a table"


def describe_plan(config: Config, machine: Machine) -> list[tuple[str, str]]:
    """Return the rows of the plan's table as (label, text)."""
    config = with_counted_vocabulary(config)
    plan = make_plan(config, machine)
    embeddings = plan.parameters - count_non_embedding(config.model)
    head = "shared with the head" if config.model.tie_word_embeddings else "head included"
    here = describe_machine(machine)
    batch_size = config.training.batch_size
    return [
        (
            "parameters",
            f"{plan.parameters:,}: {embeddings:,} in embeddings ({head}), {plan.parameters - embeddings:,} in the blocks",
        ),
        ("compute", f"{plan.flops_per_token / 1e9:.3g} GFLOP per token, {plan.tokens_per_step:,} tokens per step"),
        ("memory", f"about {format_bytes(plan.memory.total)} with batch_size {batch_size}"),
        *((f"  {part}", format_bytes(size)) for part, size in asdict(plan.memory).items()),
        ("checkpointing", describe_checkpointing(config, machine, plan.throughput)),
        (
            "disk",
            f"{format_bytes(plan.disk.total)}: {plan.disk.checkpoints:,} checkpoints of "
            f"{format_bytes(plan.disk.checkpoint_bytes)}",
        ),
        ("tokens", describe_tokens(config, plan)),
        ("time here", f"about {describe_time(plan)} on {here}; {describe_origin(plan.throughput)}"),
        *describe_all_gpus(config, machine),
        *((f"  one {card}", describe_card(config, card, size)) for card, size in CARDS.items()),
    ]


def with_counted_vocabulary(config: Config) -> Config:
    """Return the config with the vocabulary size that an earlier run had with the same text, if there was one."""
    counted = (corpus for name in config.data.inputs if (corpus := find_corpus(config, name)) and corpus.is_counted)
    corpus = next(counted, None)
    return config.with_vocab_size(corpus.vocab_size) if corpus else config


def describe_tokens(config: Config, plan: Plan) -> str:
    """Return the number of tokens in the run: in total, per parameter and in epochs of each input."""
    tokens = plan.tokens_per_step * config.training.train_steps
    fresh = tokens * config.data.stride / config.training.sequence_length
    parts = [f"{tokens:,} in the run, {tokens / plan.parameters:.3g} per parameter"]
    for name, share in zip(config.data.inputs, config.shares, strict=True):
        label = f"{name}: " if config.data.mixture else ""
        parts.append(label + describe_epochs(name, fresh * share, find_corpus(config, name)))
    return "; ".join(parts)


def describe_epochs(name: str, fresh: float, corpus: Corpus | None) -> str:
    """Return how many epochs `fresh` tokens from an input are."""
    if corpus is None:
        return f"epochs unknown: {name} does not exist"
    origin = "counted by an earlier run" if corpus.is_counted else "estimated from the file's size"
    return f"{fresh / max(1, corpus.train_tokens):.3g} epochs of {corpus.train_tokens:,} ({origin})"


def describe_checkpointing(config: Config, machine: Machine, throughput: Throughput) -> str:
    """Return what gradient checkpointing saves and costs."""
    seconds, memory = {}, {}
    for is_on in (True, False):
        changed = config.with_training(gradient_checkpointing=is_on)
        seconds[is_on] = estimate_duration(changed, machine, throughput).step
        memory[is_on] = estimate_memory(changed, machine.device).total
    on, off = (f"{format_bytes(memory[is_on])}, {format_step_time(seconds[is_on])}" for is_on in (True, False))
    state = "on" if config.training.gradient_checkpointing else "off"
    saved = format_bytes(memory[False] - memory[True])
    return (
        f"{state}; on: {on}; off: {off}; it saves {saved} and adds {seconds[True] / seconds[False] - 1:.0%} to the time"
    )


def describe_all_gpus(config: Config, machine: Machine) -> list[tuple[str, str]]:
    """Return the table row for all GPUs together; no row if there are fewer than two."""
    if machine.gpus < 2:
        return []
    together = Machine(machine.device, machine.cores, machine.gpus, devices=machine.gpus)
    return [
        (f"  all {machine.gpus} GPUs", f"about {describe_time(make_plan(config, together))} with ./run_training.sh")
    ]


def describe_card(config: Config, card: str, gigabytes: int) -> str:
    """Return the time and memory that the run would take on a common GPU."""
    machine = Machine(card, cores=1)
    needed = estimate_memory(config, card).total
    if needed > gigabytes * 1e9:
        return f"does not fit: {format_bytes(needed)} of {gigabytes} GB; lower training.batch_size"
    duration = estimate_duration(config, machine, table_throughput(config, machine))
    return f"about {format_estimate(duration.total)}, {format_bytes(needed)} of {gigabytes} GB"


def describe_time(plan: Plan) -> str:
    """Return the time of the run and of one step, such as `2.5 hours (0.34 s per step)`."""
    return f"{format_estimate(plan.duration.total)} ({format_step_time(plan.duration.step)})"
