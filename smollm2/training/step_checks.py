"""Checks of the loss, the step and a save, on the twin of a run's model."""

import dataclasses
import math
import tempfile
from pathlib import Path

import numpy as np
import torch

from smollm2.analysis.checks import Finding, judge, skipped
from smollm2.analysis.probe import largest
from smollm2.checkpoint.discovery import load_checkpoint
from smollm2.checkpoint.saving import save_state
from smollm2.data.windows import Batch, Windows, stack
from smollm2.runtime.random_state import restore_random_state
from smollm2.training.optim import learning_rate_at
from smollm2.training.progress import Progress
from smollm2.training.resume import restore, state_of
from smollm2.training.setup import Start
from smollm2.training.step import split
from smollm2.training.twin import ROWS, Capture, Twin, difference, rounding_of, weights_of

RATE, WIDTH, NARROWEST = {"adamw": 3e-3, "muon": 1e-2}, 256, 8
"""Learning rates at which a model of this width learns within some steps; with the square root of 1 / width, others do too.
The run's own rate may be too low for that, and rightly so. A narrower model than the last number cannot learn so fast."""

FITTED_STEPS, FITTED = 12, 0.8
"""Steps on one batch, and the share of its first loss that may be left. A sound model is at 0.01 to 0.71."""

COPIED_STEPS, COPIED_IDS, LEARNED = 40, 16, 0.5
"""Steps of the copy task at most, the ids in it, and the loss at which it is learned; a guess among the ids has 2.8. A sound
model knows nearly all of them then."""


def rate_of(twin: Twin) -> float:
    """Return the learning rate for learning within some steps."""
    return RATE[twin.run.config.training.optimizer] * math.sqrt(WIDTH / twin.model.config.hidden_size)


def check_accumulation(twin: Twin) -> Finding:
    """Take the batch at once, and sequence by sequence: the gradients must be equal."""
    captures, results = [], []
    for size in (ROWS, 1):
        captures.append(Capture(twin.model))
        results.append(twin.step(twin.rows, size, watch=captures[-1]))
    worst, name = difference(captures[1].before, captures[0].before)
    return judge(
        worst <= rounding_of(twin) and abs(results[0].loss - results[1].loss) <= rounding_of(twin) * results[0].loss,
        "accumulating micro-batches does not give the gradient of the whole batch",
        "divide the sum of the losses once, by the number of targets of the whole batch",
        evidence={
            "gradients differ by": worst,
            "most in": name,
            "losses": f"{results[0].loss:.5f} and {results[1].loss:.5f}",
        },
    )


def check_micro_batches(twin: Twin) -> Finding:
    """Split the batch into single sequences: they must be the rows of the batch, each once."""
    parts = split(twin.rows, 1, twin.run.runtime)
    rows = [tuple(part[0].flatten().tolist()) for part in parts]
    expected = [tuple(row) for row in twin.rows.input_ids.tolist()]
    return judge(
        rows == expected,
        "the micro-batches are not the parts of the batch",
        "look at how the batch is split",
        evidence={"micro-batches": len(rows), "different ones": len(set(rows))},
    )


def check_clipping(twin: Twin) -> Finding:
    """Take a step with a limit of half the gradient's norm: all gradients must be halved."""
    free = Capture(twin.model)
    norm = twin.step(twin.rows, watch=free).grad_norm
    exact = float(torch.stack([g.double().norm() for g in free.before.values()]).norm())
    clipped = Capture(twin.model)
    twin.step(twin.rows, max_grad_norm=exact / 2, watch=clipped)
    worst, name = difference(clipped.after, {n: g / 2 for n, g in free.before.items()})
    evidence = {"norm": norm, "by the formula": exact, "clipped gradients differ by": worst}
    if not abs(norm / exact - 1) <= 1e-3:
        return Finding("fail", evidence, "the gradient's norm is wrong", "take it over all parameters, after unscaling")
    return judge(
        worst <= rounding_of(twin),
        f"clipping does not act on the global norm (first seen in {name})",
        "multiply all gradients by the same factor",
        evidence=evidence,
    )


def check_loss_scale(twin: Twin) -> Finding:
    """Take a step with a loss scale of 1,024, as fp16 has one: gradients and norm must be those without it."""
    plain, scaled = Capture(twin.model), Capture(twin.model)
    without = twin.step(twin.rows, watch=plain)
    scaler = torch.amp.GradScaler(twin.run.runtime.device.type, init_scale=1024.0, enabled=True)
    runtime = dataclasses.replace(twin.run.runtime, scaler=scaler)
    other = dataclasses.replace(twin, run=dataclasses.replace(twin.run, runtime=runtime))
    result = other.step(twin.rows, watch=scaled)
    worst, _ = difference(scaled.before, plain.before)
    return judge(
        worst <= rounding_of(twin) and abs(result.grad_norm / without.grad_norm - 1) <= rounding_of(twin),
        "the loss scale is still in the gradients when they are clipped",
        "unscale the gradients before their norm is taken",
        evidence={"norm": result.grad_norm, "without a loss scale": without.grad_norm},
    )


def check_updates(twin: Twin) -> Finding:
    """Take one step: every trainable parameter must change."""
    twin = twin.again()
    before = {name: p.detach().clone() for name, p in twin.model.named_parameters()}
    twin.step(twin.rows, rate=1e-3)
    still = [name for name, p in twin.model.named_parameters() if torch.equal(p.detach(), before[name])]
    cause = f"the optimizer does not change {still[0] if still else ''}"
    more = f", and {len(still) - 1} more" if len(still) > 1 else ""
    return judge(
        not still, cause + more, "look at the optimizers' parameter groups", evidence={"parameters": len(before)}
    )


def check_decay(twin: Twin) -> Finding:
    """Take a step with gradients of zero: the parameters that decay must shrink, and no others."""
    twin, t, wrong = twin.again(), twin.run.config.training, []
    rate, before = 1e-2, {}
    with torch.no_grad():
        for name, p in twin.model.named_parameters():
            before[name] = p.fill_(0.5).clone()
            p.grad = torch.zeros_like(p)
    for optimizer in twin.run.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    for name, p in twin.model.named_parameters():
        decays = t.decay == "all" or p.ndim >= 2
        expected = 0.5 * (1 - rate * t.weight_decay) if decays else 0.5
        if not torch.allclose(p, torch.full_like(p, expected), rtol=1e-5, atol=0):
            wrong.append(name)
    shown = (
        f"{wrong[0]} {'decays' if wrong and twin_ndim(twin, wrong[0]) < 2 else 'does not decay as configured'}"
        if wrong
        else ""
    )
    return judge(
        not wrong,
        shown,
        "look at the optimizers' groups and at training.decay",
        evidence={"decay": t.weight_decay, "of": t.decay},
    )


def twin_ndim(twin: Twin, name: str) -> int:
    """Return the number of dimensions of a parameter."""
    return dict(twin.model.named_parameters())[name].ndim


def check_rates(twin: Twin) -> Finding:
    """Compare the learning rates that the steps get with the schedule, written down once more."""
    t = twin.run.config.training
    last = t.train_steps - 1
    decay_from = max(t.warmup_steps, t.train_steps - t.decay_steps) if t.schedule == "wsd" else t.warmup_steps
    chosen = sorted({0, t.warmup_steps // 2, t.warmup_steps - 1, decay_from, (decay_from + last) // 2, last})
    steps = [step for step in chosen if 0 <= step <= last]
    worst, found = 0.0, {}
    documents = None if twin.rows.document_ids is None else twin.rows.document_ids[:1]
    row = Batch(twin.rows.input_ids[:1], twin.rows.labels[:1], documents)
    for step in steps:
        rate = learning_rate_at(step, t)
        twin.step(row, rate=rate)
        used = {group["lr"] for optimizer in twin.run.optimizers.values() for group in optimizer.param_groups}
        part = np.clip((step - decay_from) / max(1, t.train_steps - decay_from), 0, 1)
        shape = 0.5 + 0.5 * np.cos(np.pi * part) if t.schedule == "cosine" else 1 - part
        exact = t.min_learning_rate + (t.learning_rate - t.min_learning_rate) * float(shape)
        exact = t.learning_rate * (step + 1) / t.warmup_steps if step < t.warmup_steps else exact
        worst = max(worst, *(abs(one - exact) / t.learning_rate for one in (rate, *used)))
        found[f"step {step + 1}"] = rate
    return judge(
        worst <= 1e-9,
        "the learning rates are not those of the schedule",
        "make the rate a function of the step alone: one update, one step, on any number of processes",
        evidence=found,
    )


def check_overfit(twin: Twin) -> Finding:
    """Take some steps on one batch: its loss must fall."""
    if twin.model.config.hidden_size < NARROWEST:
        return skipped(f"a model that is {twin.model.config.hidden_size} wide does not learn within some steps")
    twin, rate = twin.again(), rate_of(twin)
    losses: list[float] = []
    while len(losses) < FITTED_STEPS and not (losses and losses[-1] <= FITTED * losses[0] / 2):
        losses.append(twin.step(twin.rows, rate=rate, max_grad_norm=1.0).loss)
    return judge(
        losses[-1] <= FITTED * losses[0],
        "the model does not learn even one batch",
        "look at the gradients, the optimizer and the learning rate it gets",
        evidence={"first loss": losses[0], f"after {len(losses) - 1} steps": losses[-1]},
    )


def check_next_token(twin: Twin) -> Finding:
    """Train on a sequence in which each token determines the next: the model must predict the next one.

    A model that predicts the token it reads was trained without the shift, one that predicts the token after the next was
    trained with two.
    """
    if twin.model.config.hidden_size < NARROWEST:
        return skipped(f"a model that is {twin.model.config.hidden_size} wide does not learn within some steps")
    twin, rate = twin.again(), rate_of(twin)
    count = min(COPIED_IDS, twin.probe.vocab_size)
    cycle = np.random.default_rng(twin.probe.seed).permutation(count)
    following = {int(one): int(cycle[(at + 1) % count]) for at, one in enumerate(cycle)}
    tokens = np.resize(cycle, ROWS * twin.probe.length + 1).astype(np.uint16)
    windows = Windows(tokens, twin.probe.length, twin.probe.length, twin.probe.vocab_size)
    batch = stack([windows.read(i) for i in range(ROWS)])
    if twin.run.config.data.document_mask:
        batch = batch._replace(document_ids=np.zeros_like(batch.input_ids))
    for _ in range(COPIED_STEPS):
        if twin.step(batch, rate=rate, max_grad_norm=1.0).loss < LEARNED:
            break
    ids = twin.run.runtime.to_device(batch.input_ids[:1])
    chosen = twin.probe.read(ids).argmax(-1)[0].tolist()
    own, one, two = ids[0].tolist(), [following[i] for i in ids[0].tolist()], []
    two = [following[i] for i in one]
    shares = [sum(a == b for a, b in zip(chosen, wanted, strict=True)) / len(chosen) for wanted in (own, one, two)]
    cause = "the model does not learn which token follows"
    if max(shares) > 0.5:
        cause = (
            "the model learns the token that it reads: the labels are not shifted",
            cause,
            "the model learns the token after the next: the labels are shifted twice",
        )[int(np.argmax(shares))]
    return judge(
        shares[1] > 0.5,
        cause,
        "labels[t] must be the token after input_ids[t]; shift either in the data or in the loss",
        evidence={"share of the token itself": shares[0], "of the next": shares[1], "of the one after": shares[2]},
    )


def check_save(twin: Twin) -> Finding:
    """Save after a step, load into another model, and take the next step in both: they must have the same bits."""
    first = twin.again()
    rate = rate_of(twin)
    torch.rand(3)  # so that the random state is not that of a new twin
    progress = Progress().after(first.step(first.rows, rate=rate))
    with tempfile.TemporaryDirectory() as folder:
        state = state_of(first.run, progress)
        path = save_state(Path(folder), state)
        drawn, position = torch.rand(1), first.run.batches.window_ids(progress.step).tolist()
        first.step(first.rows, rate=rate)
        second = twin.again()
        with torch.no_grad():
            for parameter in second.model.parameters():
                parameter.add_(1)
        start = Start(path, load_checkpoint(path))
        found = restore(second.run, start)
        restore_random_state(start.state["rng"])
    again, next_position = torch.rand(1), second.run.batches.window_ids(found.step).tolist()
    second.step(second.rows, rate=rate)
    worst, name = difference(weights_of(second), weights_of(first))
    problems = {
        "the random state": not torch.equal(drawn, again),
        "the position in the data": position != next_position or found != progress,
        f"the weights or the optimizer's state ({name})": worst != 0,
    }
    lost = [what for what, is_lost in problems.items() if is_lost]
    return judge(
        not lost,
        f"a resume does not restore {' and '.join(lost)}",
        "look at what state_of saves and restore reads",
        evidence={"weights after the next step differ by": worst},
    )


def check_compilation(twin: Twin) -> Finding:
    """Compare the compiled blocks of the twin with the same blocks, uncompiled."""
    from smollm2.runtime.device import compile_blocks

    if twin.run.config.training.compile is not True:
        return skipped("the run does not compile")
    twin, ids = twin.again(), twin.probe.draw(2)
    plain = twin.probe.read(ids)
    compile_blocks(twin.model.model.layers)
    with torch.no_grad():
        compiled = twin.probe.logits(ids, None).float()
    worst = largest(compiled - plain) / plain.std().item()
    return judge(
        worst <= 10 * rounding_of(twin),
        "compiled blocks compute other logits",
        "set training.compile to false, and report the version of torch",
        evidence={"logits differ by": worst},
    )
