"""A short measurement of how fast this machine computes matrix products, used only to correct estimated times."""

import os
import time
from dataclasses import replace

import torch

from smollm2.plan.machine import Machine, cpu_class, find_machine, memory_limit
from smollm2.plan.scale import Cluster
from smollm2.runtime.device import Runtime

SIDE = 512
"""Rows and columns of the measured matrices."""


def measure_products(dtype: torch.dtype = torch.float32, seconds: float = 0.4) -> float:
    """Return the FLOP/s of matrix products on the CPU with torch's threads, without drawing random numbers.

    The rate is that of the first quartile of the durations: other programs and sleeping cores can only slow a product
    down.
    """
    with torch.inference_mode():
        matrix = torch.full((SIDE, SIDE), 1 / SIDE, dtype=dtype)
        product = matrix @ matrix  # warm-up: the first one is slower
        end = time.perf_counter() + seconds
        durations: list[float] = []
        while not durations or time.perf_counter() < end:
            began = time.perf_counter()
            torch.mm(matrix, matrix, out=product)
            durations.append(time.perf_counter() - began)
    return float(2 * SIDE**3 / sorted(durations)[len(durations) // 4])


def machine_of(runtime: Runtime) -> Machine:
    """Return the machine on which the ranks of a run compute, as `smollm2 plan` describes it."""
    found = find_machine(os.environ)
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if runtime.device.type == "cuda":
        name = torch.cuda.get_device_name(runtime.device)
        return replace(found, device=name, gpus=max(1, found.gpus), devices=runtime.world_size)
    device = "mps" if runtime.device.type == "mps" else cpu_class(os.environ)
    cores = min(found.cores, local * torch.get_num_threads())
    return replace(found, device=device, cores=cores, gpus=0, devices=max(1, runtime.world_size // local))


def cluster_of(runtime: Runtime) -> Cluster:
    """Return how many machines the ranks of a run are on, and how many ranks each machine has."""
    devices = int(os.environ.get("LOCAL_WORLD_SIZE") or runtime.world_size)
    return Cluster(max(1, runtime.world_size // devices), min(devices, runtime.world_size))


def memory_of(runtime: Runtime) -> int:
    """Return the bytes of memory of this rank's device; the processes of a machine without GPUs share its memory."""
    if runtime.device.type == "cuda":
        return int(torch.cuda.get_device_properties(runtime.device).total_memory)
    return memory_limit() // cluster_of(runtime).devices


def measure_if_long(runtime: Runtime, machine: Machine, seconds: float) -> float | None:
    """Return the measured FLOP/s of this machine's matrix products, or None if the run is too short for that.

    Only runs on a CPU are measured, and only if their estimated duration `seconds` is at least 20 s.
    """
    if not machine.is_cpu or seconds < 20:
        return None
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # all ranks on a machine measure at the same time
    return local * measure_products(runtime.precision.dtype)
