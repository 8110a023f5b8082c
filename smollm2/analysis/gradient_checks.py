"""The checks of a model's gradients: every parameter gets one, and it is the slope of the loss."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from smollm2.analysis.checks import Check, Finding, judge, skipped
from smollm2.analysis.probe import Probe, evaluating, is_coarse, largest

STEP = 3e-3
"""The relative change of a loss that a finite difference aims at: rounding of float32 is then 2e-4 of it, and curvature was at
most 5e-3."""

MOST_PARAMETERS = 40
"""Parameters that are moved, spread over the model."""

AGREEMENT = 3e-2
"""The largest relative difference between a gradient and its finite difference; a wrong term gives tenths."""

PARTS = (1, 4, 16)
"""Divisors of the step that are tried until gradient and finite difference agree. If they never do, two finite differences
must agree with each other: else the loss has a kink or a jump there, as with experts that are chosen by their scores."""

DRAWS = 8
"""Inputs that a parameter may need to get a gradient: no token of the first may be routed to its expert."""


def check_gradients(probe: Probe) -> Finding:
    """Run backward passes: each parameter must get a gradient that is finite and not zero everywhere."""
    kept = [(p, p.grad) for p in probe.module.parameters()]
    try:
        for p, _ in kept:
            p.grad = None
        for salt in range(DRAWS):
            with evaluating(probe.module):
                loss_of(probe, probe.draw(2, salt)).backward()  # type: ignore[no-untyped-call]
            if not (wrong := list(find_wrong_gradients(probe.module))):
                break
    finally:
        for p, gradient in kept:
            p.grad = gradient
    cause = f"{wrong[0] if wrong else ''}{f', and {len(wrong) - 1} more' if len(wrong) > 1 else ''}"
    advice = "look for a part that is frozen, detached, or whose output is not used"
    is_meant = probe.may_freeze and all(one.endswith(FROZEN) for one in wrong)
    return judge(not wrong, cause, advice, warns=is_meant, evidence={"parameters": len(kept)})


FROZEN = " is frozen"


def find_wrong_gradients(module: nn.Module) -> Iterator[str]:
    """Yield a phrase for each parameter whose gradient is missing, zero or not finite."""
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            yield f"{name}{FROZEN}"
        elif parameter.grad is None:
            yield f"{name} gets no gradient"
        elif not parameter.grad.isfinite().all():
            yield f"{name} gets a gradient that is not finite"
        elif not parameter.grad.any():
            yield f"{name} gets a gradient of zero"


def check_finite_differences(probe: Probe) -> Finding:
    """Move each parameter along its own gradient: the loss must change by what the gradient says."""
    ids = probe.draw()
    if is_coarse(probe):
        return skipped("16 bits are too coarse for finite differences")
    every = [(name, p) for name, p in probe.module.named_parameters() if p.requires_grad]
    chosen = every[:: -(-len(every) // MOST_PARAMETERS)]
    probe.module.zero_grad(set_to_none=True)
    with evaluating(probe.module):
        base = loss_of(probe, ids)
        base.backward()  # type: ignore[no-untyped-call]
        found = {name: compare_slope(probe, ids, p, base.item()) for name, p in chosen}
    probe.module.zero_grad(set_to_none=True)
    errors = {name: error for name, error in found.items() if error is not None}
    if not errors:
        return skipped("the loss has kinks or jumps along every gradient")
    which = max(errors, key=lambda name: errors[name] if math.isfinite(errors[name]) else math.inf)
    return judge(
        errors[which] <= AGREEMENT,
        f"the gradient of {which} is not the slope of the loss",
        "look at the backward pass of the operations that use it",
        evidence={"largest relative difference": errors[which], "parameters": len(errors), "of": len(every)},
    )


@torch.no_grad()
def compare_slope(probe: Probe, ids: Tensor, parameter: nn.Parameter, loss: float) -> float | None:
    """Return how far a parameter's gradient is from the slope that two losses around it show, relative to the gradient.

    Return None if the slopes of two distances differ, so that neither is the derivative.
    """
    gradient = parameter.grad
    slope = 0.0 if gradient is None else gradient.double().square().sum().item()
    if gradient is None or not slope:
        return 0.0  # named by the check of gradients
    size = STEP * abs(loss) / slope
    size = min(size, STEP * max(largest(parameter), 0.1) / largest(gradient))  # where the loss is nearly linear
    original, ratios, error = parameter.detach().clone(), [], 0.0
    for part in PARTS:
        losses = []
        for sign in (1, -1):
            parameter.copy_(original + sign * size / part * gradient)
            losses.append(loss_of(probe, ids).item())
        parameter.copy_(original)
        ratios.append((losses[0] - losses[1]) / (2 * size / part) / slope)
        noise = 4e-7 * abs(loss) / (size / part * slope)  # of the rounding of two losses
        error = abs(ratios[-1] - 1) - noise
        if error <= AGREEMENT:
            return max(0.0, error)
    return None if abs(ratios[-1] - ratios[-2]) > AGREEMENT * abs(ratios[-2]) + noise else error


def loss_of(probe: Probe, ids: Tensor) -> Tensor:
    """Return the sum of the next-token losses of ids (B, T), by the model's own loss function if there is one."""
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    if probe.loss is not None:
        return probe.loss(ids, labels)
    logits = probe.logits(ids, None).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


DIFFERENCES: Check[Probe] = Check(
    "finite differences",
    "model",
    "Gradients are the slopes of the loss.",
    "Each parameter of a small model is moved along its own gradient, forwards and back. The loss must change as the gradient "
    "says, unless it has a kink or a jump there.",
    "An error below 3 %, or in a direction other than the gradient's.",
    check_finite_differences,
)
"""It moves the weights, so it is for a copy or a small model."""
