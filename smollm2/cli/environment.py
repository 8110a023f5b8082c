"""The environment variables through which a launcher passes each process its rank."""

from collections.abc import Mapping, MutableMapping

from smollm2.errors import ConfigError

INTEGERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
OF_MPI = (
    "PMI_RANK",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
)
"""The variables that accelerate reads in place of these under an MPI launcher."""

OTHERS = ("MASTER_ADDR", "OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION")


def clean_environment(environment: MutableMapping[str, str]) -> None:
    """Remove empty variables, which count as unset. Raise ConfigError if a numeric variable is not a whole number."""
    for name in (*INTEGERS, *OF_MPI, *OTHERS):
        if not environment.get(name, "x").strip():
            del environment[name]
    for name in INTEGERS:
        if not environment.get(name, "0").isdecimal():
            what = f"must be a whole number (got {environment[name]!r})"
            raise ConfigError(name, what, "correct this environment variable, or unset it")


def check_launch(environment: Mapping[str, str]) -> None:
    """Raise ConfigError if a launcher has set only some of the variables, or has started too few processes."""
    if "RANK" in environment or "WORLD_SIZE" in environment:
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if missing:
            given = "RANK" if "RANK" in environment else "WORLD_SIZE"
            what = f"not set, but {given} is {environment[given]}"
            raise ConfigError(
                ", ".join(missing), what, f"start the run with torchrun, which sets all of them, or unset {given}"
            )
    # `accelerate launch --num_processes 2` without --multi_gpu silently runs one process on a CPU.
    elif {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= environment.keys():
        raise ConfigError(
            "accelerate launch",
            "started one process instead of several",
            "use accelerate launch --multi_gpu --num_processes 2 train.py ..., which works without a GPU too, or "
            "torchrun --nproc_per_node 2 train.py ...",
        )
