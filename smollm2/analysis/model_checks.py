"""Checks of any causal language model that maps token ids (B, T) to logits (B, T, V).

They change one thing in the input and look at what moves in the output, so they know nothing of the model's code.
"""

import itertools
import math

import torch
from torch import nn

from smollm2.analysis.checks import Check, Finding, judge, passed, skipped
from smollm2.analysis.gradient_checks import check_gradients
from smollm2.analysis.probe import IN_16_BITS, ROUNDING, Probe, evaluating, finite, is_coarse, largest, record_outputs

TURNED = 1e-4
"""The least relative change of an attention output, in float32, that counts as an effect of positions. Rounding gives
2e-7, and rotary positions at initialization 0.11."""

TURNED_IN_16_BITS, ROUNDED_IN_16_BITS = 2e-2, 5e-2
"""bf16's rounding alone moves an output by 4e-3, and by a few times as much over several layers."""


def check_causality(probe: Probe) -> Finding:
    """Change one token: no logits before it may move, and those of its own position must."""
    ids = probe.draw()
    before, after = 0.0, math.inf
    base = probe.read(ids)
    for t in {1, probe.length // 2, probe.length - 1}:
        changed = ids.clone()
        changed[:, t] = probe.other(ids[:, t])
        moved = (probe.read(changed) - base).abs()
        before, after = max(before, largest(moved[:, :t])), min(after, largest(moved[:, t]))
    evidence = {"logits before the changed token move by": before, "its own by": after}
    if not after > 0:
        return Finding("fail", evidence, "changing a token changes nothing", "look at how the embedding is used")
    return judge(
        before <= ROUNDING * after,
        "a position reads tokens that come after it",
        "look at the attention mask: row t may attend to columns 0 to t only",
        evidence=evidence,
    )


def check_past(probe: Probe) -> Finding:
    """Change the first token, and one in the middle: most of the later logits must move, or as many after any token."""
    ids, last, middle = probe.draw(), probe.length - 1, probe.length // 2
    base = probe.read(ids)

    def measure(t: int) -> tuple[float, int]:
        """Return the share of later positions that move if the token at t changes, and how many positions it reaches."""
        changed = ids.clone()
        changed[:, t] = probe.other(ids[:, t])
        moved = (probe.read(changed) - base).abs().amax(-1)[0, t + 1 :] > 0
        return moved.float().mean().item(), int(moved.nonzero().max()) + 1 if moved.any() else 0

    (share, reach), (later_share, _) = measure(0), measure(middle)
    # A window slides: each token reaches about as far as the first. Blocks end, and with them the reach of their last tokens.
    is_window = reach > 0 and all(
        2 * measure(t)[1] >= min(reach, last - t) for t in {reach - 1, min(reach, last - 1), middle}
    )
    return judge(
        min(share, later_share) > 0.5 or is_window,
        "a token does not reach the positions after it, so the model predicts from single tokens",
        "look at the layout that attention gets: (batch, heads, positions, width), not positions before heads",
        evidence={
            "share of later positions that move": min(share, later_share),
            "positions the first token reaches": reach,
        },
    )


def check_positions(probe: Probe) -> Finding:
    """Shuffle the past: the first output that depends on it must move by more than rounding.

    Later layers say nothing: a causal mask alone makes the order of tokens visible from the second layer on.
    """
    ids, last = probe.draw(), probe.length - 1
    changed, shuffled = ids.clone(), ids.clone()
    changed[:, 0] = probe.other(ids[:, 0])
    order = torch.randperm(last, generator=torch.Generator().manual_seed(probe.seed))
    shuffled[:, :last] = ids[:, order.to(ids.device)]
    base, other, mixed = (record_outputs(probe, one, last) for one in (ids, changed, shuffled))
    name = next((n for n, output in base.items() if n in other and not torch.equal(output, other[n])), None)
    if name is None:
        return skipped("no submodule has an output per position that depends on earlier tokens")
    turned = (largest(mixed[name] - base[name])) / max(largest(base[name]), 1e-30)
    if base[name].dtype in IN_16_BITS and turned <= TURNED_IN_16_BITS:
        return skipped("16 bits are too coarse to see what positions change in these weights")
    return judge(
        turned > TURNED,
        "the order of the past does not matter: positions are not applied",
        "look at whether the rotary tables or position embeddings are used",
        evidence={f"{name} moves by": turned},
    )


def check_batch(probe: Probe) -> Finding:
    """Change one sequence of a batch: the logits of the other may not move."""
    ids = probe.draw(2)
    changed = ids.clone()
    changed[1] = probe.other(ids[1])
    base, other = probe.read(ids), probe.read(changed)
    moved, own = largest(other[0] - base[0]), largest(other[1] - base[1])
    return judge(
        moved <= ROUNDING * own,
        "a sequence sees another sequence of its batch",
        "look for an operation over the batch dimension, or a wrong reshape",
        evidence={"the other sequence moves by": moved, "the changed one by": own},
    )


def check_documents(probe: Probe) -> Finding:
    """Change the first document of a window: the second may not move, and what comes later in the first must."""
    if not probe.isolates:
        return skipped("documents are not isolated in this run (data.document_mask)")
    ids, middle = probe.draw(), probe.length // 2
    documents = (torch.arange(probe.length, device=ids.device) >= middle).long().unsqueeze(0)
    changed = ids.clone()
    changed[:, 0] = probe.other(ids[:, 0])
    moved = (probe.read(changed, documents) - probe.read(ids, documents)).abs()
    other, own = largest(moved[:, middle:]), largest(moved[:, 1:middle])
    return judge(
        other <= ROUNDING * max(own, ROUNDING) and own > 0,
        "documents of one window see each other" if own > 0 else "a document does not see its own past",
        "look at the document mask and at the document ids of the batch",
        evidence={"the other document moves by": other, "its own by": own},
    )


def check_evaluation(probe: Probe) -> Finding:
    """Run the same input twice in evaluation mode: the logits must be the same."""
    ids = probe.draw()
    difference = largest(probe.read(ids) - probe.read(ids))
    return judge(
        difference <= ROUNDING * largest(probe.read(ids)),
        "two evaluations of one input differ: something random is active",
        "look for dropout that does not follow model.eval()",
        evidence={"the logits differ by": difference},
    )


def check_modes(probe: Probe) -> Finding:
    """Compare training and evaluation mode; they agree if training has no dropout or other noise."""
    if rate := find_dropout(probe.module):
        return skipped(f"the model has dropout ({rate:g}), so the two modes are meant to differ")
    ids = probe.draw()
    evaluated = probe.read(ids)
    with evaluating(probe.module), torch.no_grad():
        probe.module.train()
        trained, again = (finite(probe.logits(ids, None).float()) for _ in range(2))
    rounding = ROUNDED_IN_16_BITS if is_coarse(probe) else ROUNDING  # the modes may use different kernels
    allowed = rounding * largest(evaluated)
    if largest(trained - again) > allowed:
        return skipped("training is random, as with dropout, so the two modes are meant to differ")
    difference = largest(trained - evaluated)
    return judge(
        difference <= allowed,
        "training and evaluation mode compute different logits",
        "look for dropout or another layer that depends on the mode",
        evidence={"the logits differ by": difference},
    )


def find_dropout(module: nn.Module) -> float:
    """Return the highest dropout rate of a model: of a Dropout layer, or of an attribute with `drop` in its name."""
    rates = [0.0]
    for one in module.modules():
        named = {name: value for name, value in vars(one).items() if "drop" in name or name == "p"}
        rates += [value for value in named.values() if isinstance(value, float)]
    return max(rates)


def check_ties(probe: Probe) -> Finding:
    """Compare weights of the embedding's shape: two that have equal values must share their storage."""
    wide = {n: p for n, p in probe.module.named_parameters() if p.ndim == 2 and p.shape[0] == probe.vocab_size}
    for (one, first), (other, second) in itertools.combinations(wide.items(), 2):
        if first.shape == second.shape and torch.equal(first.detach(), second.detach()):
            cause = f"{one} and {other} are equal, but two separate weights"
            return Finding("fail", {"weights": len(wide)}, cause, "assign the same parameter to both")
    return passed({"weights of the vocabulary's size": len(wide)})


ANY_MODEL: list[Check[Probe]] = [
    Check(
        "causality",
        "model",
        "No position reads a token that comes after it.",
        "One token is changed. The logits before it must not move, and its own must.",
        "A leak that needs a longer input than the check's 64 tokens.",
        check_causality,
    ),
    Check(
        "past",
        "model",
        "Each position reads the tokens before it.",
        "The first token and one in the middle are changed. More than half of the later positions must move, or, in a model "
        "with a window, about as many after each token.",
        "Whether the past is used well.",
        check_past,
    ),
    Check(
        "positions",
        "model",
        "The order of tokens matters by more than the causal mask.",
        "The past is shuffled. The first output that depends on earlier tokens must move by more than rounding.",
        "Positions that are wrong but not constant; for SmolLM2 the check `reference` sees them.",
        check_positions,
    ),
    Check(
        "batch",
        "model",
        "Sequences of one batch do not see each other.",
        "One sequence is changed. The logits of the other must not move.",
        "A leak between ranks.",
        check_batch,
    ),
    Check(
        "documents",
        "model",
        "Documents of one window do not see each other, if they are isolated.",
        "A token of the first of two documents is changed. The second must not move.",
        "Document ids that are wrong in the data; the check `targets` looks at the data.",
        check_documents,
    ),
    Check(
        "ties",
        "model",
        "Weights that are equal are one weight.",
        "Weights of the embedding's shape are compared by value and by storage.",
        "A tie of two weights that already differ; for SmolLM2 the check `parameters` sees it.",
        check_ties,
    ),
    Check(
        "evaluation",
        "model",
        "An evaluation has one result.",
        "The same input is evaluated twice.",
        "Randomness that needs more than 64 tokens or more than one sequence.",
        check_evaluation,
    ),
    Check(
        "modes",
        "model",
        "Training and evaluation mode compute the same logits, if training is not random, as with dropout.",
        "The same input is run in both modes.",
        "A wrong dropout rate.",
        check_modes,
    ),
    Check(
        "gradients",
        "model",
        "Every parameter is trained.",
        "Backward passes on up to eight inputs; each gradient must be there, finite and not zero everywhere.",
        "A gradient that is wrong but not zero; the check `finite differences` sees it.",
        check_gradients,
    ),
]
"""Checks that read the model, and leave its weights and gradients as they are."""
