"""The loss around a model's weights, along a random direction and over the plane spanned by two (Li et al. 2018).

Each row of a weight matrix is perturbed by a random vector with the norm of that row (filter normalization, arXiv
1712.09913, section 4). Without it, two networks that compute the same function at different internal scales would have
different landscapes. The weights and biases of norms are not perturbed. Points of the plane are pairs of integers, so
that measured points can be looked up and those on the line through the centre are measured only once. The weights are
always restored from a copy.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smollm2.checkpoint.format import content_hash
from smollm2.config.schema import IGNORE_INDEX, Config
from smollm2.data.corpus import (
    Listener,
    open_data_input,
    open_tokens_of,
    plain_encoder,
    training_windows,
    validation_windows,
)
from smollm2.data.store import TokenStore, open_tokens
from smollm2.data.tokenizer import Tokenizer
from smollm2.data.windows import JoinedWindows, TokenWindows, WindowSource
from smollm2.errors import CheckpointError
from smollm2.formatting import format_estimate
from smollm2.inference.evaluation import score_windows, spread
from smollm2.inference.loading import load_source, read_config
from smollm2.plan import arithmetic as plan
from smollm2.runtime.sharding import lay_out_like, local
from smollm2.storage.atomic import probe_folder, write_atomically
from smollm2.storage.run_folder import find_checkpoint, is_parted
from smollm2.tracking.base import Landscape
from smollm2.tracking.jsonl import landscape_json

WINDOWS = 8
"""The number of windows on which the loss is measured at each point; they are spread over the validation split."""

REACH = 1.0
"""The largest distance from the centre along a direction, as a multiple of the weights' norm."""

SHARE = 0.015
"""The fraction of a run's compute that one landscape may use."""

SIDES = (25, 21, 17, 13, 11, 9, 7, 5)
"""Possible numbers of points per side of the plane; a run uses the largest affordable one. Odd, to have a centre."""

COPIES = 3
"""Extra copies of the weight matrices that are kept in memory: the two directions and the original weights."""

SECONDS_BETWEEN_WRITES = 2.0

Point = tuple[int, int]


def choose_side(config: Config, device: str, sequences: int) -> int:
    """Return the points per side of a run's landscape; 0 if the run is too short or the copies need too much memory.

    The number is calculated, not timed, so a resumed run chooses the same one. A forward pass counts as a third of a
    step, and the copies must fit into the memory that a step uses for gradients, activations and loss. `device` is a
    device name as in `estimate_memory`.
    """
    t = config.training
    at_once = config.with_training(batch_size=sequences)
    memory = plan.estimate_memory(at_once, device)
    if COPIES * 4 * plan.count_parameters(config.model) > memory.gradients + memory.activations + memory.loss:
        return 0
    affordable = 3 * SHARE * config.global_batch_size * t.train_steps / WINDOWS
    return next((side for side in SIDES if len(list_points(side)) <= affordable), 0)


def list_points(side: int) -> list[Point]:
    """Return each point once: the centre (side - 1, side - 1), the line through it in half grid steps, the plane."""
    centre = side - 1
    line = [(along, centre) for along in range(2 * side - 1)]
    plane = [(2 * i, 2 * j) for i in range(side) for j in range(side)]
    return list(dict.fromkeys([(centre, centre), *line, *plane]))


def measure_landscape(
    model: nn.Module,
    measure_loss: Callable[[], float],
    *,
    side: int,
    seed: int,
    targets: int,
    known: Mapping[Point, float] | None = None,
    on_point: Callable[[Point, float], None] = lambda point, loss: None,
) -> Landscape:
    """Return the landscape around the model's weights, on a grid of `side` x `side` points; `side` is odd.

    `measure_loss` returns the mean loss over `targets` tokens at the current weights. The losses of `known` points are
    reused. `on_point` is called after each measured point and may raise.
    """
    losses = dict(known or {})
    with movable(model, seed) as move:
        for point in list_points(side):
            if point not in losses:
                move(*(position(index, side) for index in point))
                losses[point] = measure_loss()
                on_point(point, losses[point])
    line, grid = range(2 * side - 1), range(0, 2 * side - 1, 2)
    return Landscape(
        loss=losses[side - 1, side - 1],
        line_at=[position(index, side) for index in line],
        line=[losses[index, side - 1] for index in line],
        grid_at=[position(index, side) for index in grid],
        grid=[[losses[i, j] for j in grid] for i in grid],
        seed=seed,
        targets=targets,
    )


def position(index: int, side: int) -> float:
    """Return the coordinate of an index in half grid steps: -REACH to REACH, with 0 at the centre."""
    return REACH * (index - (side - 1)) / (side - 1)


@contextlib.contextmanager
@torch.no_grad()
def movable(model: nn.Module, seed: int) -> Iterator[Callable[[float, float], None]]:
    """Yield a function that moves the weights to a point of the plane; restore the weights on exit."""
    parameters = [p for p in model.parameters() if p.ndim > 1]
    matrices = [local(p.detach()) for p in parameters]
    generator = torch.Generator().manual_seed(seed)
    first, second = ([draw_direction(p, generator) for p in parameters] for _ in range(2))
    before = [matrix.clone() for matrix in matrices]

    @torch.no_grad()
    def move(along_first: float, along_second: float) -> None:
        torch._foreach_copy_(matrices, before)
        torch._foreach_add_(matrices, first, alpha=along_first)
        torch._foreach_add_(matrices, second, alpha=along_second)

    try:
        yield move
    finally:
        torch._foreach_copy_(matrices, before)


def draw_direction(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random matrix with the row norms of `matrix`, drawn on the CPU to be the same on every device.

    If the matrix is shared out, return this rank's rows.
    """
    drawn = torch.randn(matrix.shape, generator=generator).to(matrix.dtype)
    direction, matrix = local(lay_out_like(drawn, matrix)).to(matrix.device), local(matrix.detach())
    return direction.mul_(matrix.norm(dim=1, keepdim=True) / direction.norm(dim=1, keepdim=True))


def choose_windows(windows: WindowSource) -> tuple[list[int], int]:
    """Return the indices of the windows on which a landscape is measured, and the total number of their targets."""
    indices = spread(len(windows), WINDOWS)
    return indices, sum(int((windows.read(index)[1] != IGNORE_INDEX).sum()) for index in indices)


@dataclass(frozen=True)
class Source:
    """A checkpoint whose landscape is measured, and the text on which the loss is measured."""

    path: Path
    state: Mapping[str, Any]
    config: Config
    tokenizer: Tokenizer
    tokens: str  # the fingerprints of its tokens
    windows: WindowSource
    indices: list[int]
    targets: int
    model: nn.Module


def open_source(
    path: Path, input_file: str | None, spool: Path, device: str, report: Callable[[str], None], *, best: bool = False
) -> Source:
    """Open a `.pt` file, or the newest valid (or the best) checkpoint of a run folder, and load its tokens.

    The tokens are those of `input_file` if given, else the cached tokens of the run, else those of the run's text. Text
    is tokenized into `spool`. Raise CheckpointError or DataError.
    """
    model, tokenizer, state = load_source(path, best=best, report=report)
    if state is None:
        raise CheckpointError(
            path, "an exported model does not record its training text", "use a checkpoint or a run folder"
        )
    path = find_checkpoint(path, state["step"]) if path.is_dir() and not is_parted(path) else path
    config = read_config(state, path)
    stores = open_stores(config, state, tokenizer, input_file, spool)
    held_out = [validation_windows(config, tokenizer, store) for store in stores]
    found: list[TokenWindows] = [windows for windows in held_out if windows] or [
        training_windows(config, tokenizer, s) for s in stores
    ]
    windows = JoinedWindows(found)
    indices, targets = choose_windows(windows)
    fingerprint = " ".join(store.fingerprint for store in stores)
    return Source(path, state, config, tokenizer, fingerprint, windows, indices, targets, model.to(device))


def open_stores(
    config: Config, state: Mapping[str, Any], tokenizer: Tokenizer, input_file: str | None, spool: Path
) -> list[TokenStore]:
    """Return the tokens of the checkpoint's run, or of `input_file`; write nothing to paths in the checkpoint."""
    data, saved = config.data, state["data"]
    if input_file is None:
        fingerprints = saved.get("sources", [saved["tokens_fingerprint"]])
        stores = [open_tokens(Path(data.cache_dir) / fingerprint) for fingerprint in fingerprints]
        found = [store for store in stores if store]
        if len(found) == len(stores):
            return found
    spooled = config.model_copy(update={"data": data.model_copy(update={"cache_dir": str(spool)})})
    silent = Listener(lambda line: None, lambda label, fraction, size: None)
    sources = [open_data_input(spooled, name, silent) for name in ([input_file] if input_file else data.inputs)]
    encoder = plain_encoder(tokenizer, sources)
    return [open_tokens_of(spooled, source, tokenizer, encoder, data.held_out_fraction, silent) for source in sources]


def draw_landscape(
    source: Source,
    output: Path,
    *,
    side: int,
    seed: int,
    report: Callable[[str], None],
    show: Callable[[float], None],
) -> Landscape:
    """Report the estimated time, then measure the landscape and write it to `output`.

    Measured points are saved beside `output` until the landscape is complete, so an interrupted call can be resumed.
    Raise ResourceError if the folder cannot be written.
    """
    probe_folder(output.parent, "--output")
    partial, points = output.with_name(f"{output.name}.partial"), list_points(side)
    subject = {
        "weights": content_hash(source.state["model"]),
        "tokens": source.tokens,
        "windows": source.indices,
        "length": source.windows.length,
        "side": side,
        "seed": seed,
        "reach": REACH,
    }
    losses = read_points(partial, subject)
    known = f", {len(losses)} of them measured earlier" if losses else ""

    def measure_loss() -> float:
        bytes_per_token, batch_size = source.tokenizer.bytes_per_token, source.config.training.batch_size
        return score_windows(source.model, source.windows, source.indices, bytes_per_token, batch_size=batch_size).loss

    started_at = time.monotonic()
    losses[points[0]] = measure_loss()
    cost = format_estimate((time.monotonic() - started_at) * (len(points) - len(losses)))
    report(f"{source.path}: {len(points)} points on {source.targets:,} tokens{known}; about {cost}")
    written_at = time.monotonic()

    def on_point(point: Point, loss: float) -> None:
        nonlocal written_at
        losses[point] = loss
        show(len(losses) / len(points))
        if time.monotonic() - written_at > SECONDS_BETWEEN_WRITES:
            write_points(partial, subject, losses)
            written_at = time.monotonic()

    try:
        landscape = measure_landscape(
            source.model, measure_loss, side=side, seed=seed, targets=source.targets, known=losses, on_point=on_point
        )
    except KeyboardInterrupt:
        write_points(partial, subject, losses)
        raise
    write_atomically(output, landscape_json(landscape, source.state["step"]))
    partial.unlink(missing_ok=True)
    return landscape


def read_points(path: Path, subject: Mapping[str, object]) -> dict[Point, float]:
    """Return the points that an earlier call measured; none if the file is absent, damaged or for another landscape."""
    try:
        content = json.loads(path.read_bytes())
        if content["subject"] == subject:
            return {(int(i), int(j)): float(loss) for i, j, loss in content["points"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {}


def write_points(path: Path, subject: Mapping[str, object], losses: Mapping[Point, float]) -> None:
    """Write the measured points atomically, with the `subject` that identifies their landscape."""
    points = [[*point, loss] for point, loss in losses.items()]
    write_atomically(path, json.dumps({"subject": subject, "points": points}).encode())
