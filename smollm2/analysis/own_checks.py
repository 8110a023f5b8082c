"""Checks of our own model, whose formulas and config are known: parameters, reference, precision, initial loss."""

import math
from dataclasses import dataclass

import torch

from smollm2.analysis.checks import Check, Finding, judge, skipped
from smollm2.analysis.probe import Probe, evaluating, largest
from smollm2.analysis.reference import reference_logits, rotations
from smollm2.config.schema import ModelConfig
from smollm2.model.loss import next_token_loss
from smollm2.model.transformer import SmolLM2
from smollm2.plan.arithmetic import count_parameters

LOGITS_AGREE = 1e-3
"""The largest difference from float64, relative to the logits' standard deviation. float32 gives about 1e-5, a norm in
bf16 about 1e-2."""

LOGITS_AGREE_IN_16_BITS = 0.15
"""The same in bf16 and fp16, whose rounding adds up over the layers."""

TABLES_AGREE = 1e-3
"""The largest error of a cosine or sine. float32 angles are off by 2^-24 of a position, bf16 tables by 2^-9."""


@dataclass(frozen=True)
class Own:
    """Our model: the one that trains, and a small twin of the same widths, both with a probe.

    `is_new` says whether its weights are freshly drawn; `dtype` is that of the run's matrix products.
    """

    config: ModelConfig
    model: SmolLM2
    probe: Probe
    twin: SmolLM2
    twin_probe: Probe
    dtype: torch.dtype
    is_new: bool


def check_parameters(own: Own) -> Finding:
    """Count the parameters, and look whether embedding and head are tied as the config says."""
    found, expected = sum(p.numel() for p in own.model.parameters()), count_parameters(own.config)
    tied = own.model.lm_head.weight is own.model.model.embed_tokens.weight
    evidence = {"parameters": found, "by the config's arithmetic": expected, "tied": "yes" if tied else "no"}
    if tied != own.config.tie_word_embeddings:
        cause = "the head is not the embedding, but the config ties them" if not tied else "the head is the embedding"
        return Finding("fail", evidence, cause, "assign the embedding's weight to the head after it was made")
    return judge(
        found == expected, "the model has other parameters than its config", "look at its layers", evidence=evidence
    )


def check_reference(own: Own) -> Finding:
    """Compare the twin's logits, with and without a graph, and the model's rotary tables with float64."""
    rotary, worst_table = own.model.model.rotary, 0.0
    length = len(rotary.cos)
    for first in range(0, length, 4096):
        exact = rotations(own.config, torch.arange(first, min(first + 4096, length), device=rotary.cos.device))
        for table, part in ((rotary.cos, exact.real), (rotary.sin, exact.imag)):
            worst_table = max(worst_table, largest(table[first : first + 4096].double() - part))
    allowed = TABLES_AGREE + length * 2**-23
    ids = own.twin_probe.draw(2)
    exact = reference_logits(own.twin.state_dict(), own.twin.config, ids)
    with evaluating(own.twin):
        outputs = [own.twin_probe.logits(ids, None).detach(), own.twin_probe.read(ids)]
    difference = max(largest(found.double() - exact) for found in outputs) / exact.std().item()
    evidence = {"logits differ by": difference, "rotary tables by": worst_table}
    if not worst_table <= allowed:
        return Finding("fail", evidence, "the rotary tables are not precise", "compute and keep them in float32")
    is_wide = outputs[0].dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return judge(
        difference <= (LOGITS_AGREE if is_wide and own.dtype == torch.float32 else LOGITS_AGREE_IN_16_BITS),
        "the logits are not those of the formulas",
        "look at the norms' precision, the mask, and how often positions are applied",
        evidence=evidence,
    )


def check_precision(own: Own) -> Finding:
    """Compare the model's logits in the run's precision with those in float32."""
    if own.dtype == torch.float32:
        return skipped("the run computes in float32")
    if own.model.model.attention_backend == "varlen":
        return skipped("the attention backend has no float32 form; the check `reference` covers the precision")
    ids = own.probe.draw()
    rounded = own.probe.read(ids)
    with evaluating(own.model), torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
        exact = own.model(ids)
    difference = (largest(rounded - exact)) / exact.std().item()
    return judge(
        difference <= LOGITS_AGREE_IN_16_BITS,
        "16 bits change the logits by more than rounding",
        "look for a norm, a softmax or a table that is not kept in float32",
        evidence={"logits differ by": difference},
    )


def check_initial_loss(own: Own) -> Finding:
    """Compare the loss of a new model on random tokens with ln V + d std^2 / 2."""
    if not own.is_new:
        return skipped("the weights are not newly drawn")
    config, ids = own.config, own.probe.draw(2)
    labels = own.probe.draw(2, salt=1)
    loss = torch.nn.functional.cross_entropy(own.probe.read(ids).flatten(0, 1), labels.flatten()).item()
    expected = math.log(config.vocab_size) + config.hidden_size * config.initializer_range**2 / 2
    evidence = {"loss": loss, "expected": expected}
    # With tied weights, each position also favours its own token, which is rarely the label.
    allowed = 0.1 * math.log(config.vocab_size) + config.hidden_size * config.initializer_range**2 / 2
    if config.tie_word_embeddings:
        allowed += math.sqrt(config.hidden_size) * config.initializer_range
    return judge(
        abs(loss - expected) <= allowed,
        "the initial loss is not that of a model that knows nothing",
        "look at model.initializer_range, and at how the weights are drawn",
        warns=math.isfinite(loss),
        evidence=evidence,
    )


def check_loss(own: Own) -> Finding:
    """Compare the loss function with the cross-entropy of the logits at each label, half of which are ignored."""
    ids, labels = own.twin_probe.draw(2), own.twin_probe.draw(2, salt=1)
    labels[:, ::2] = -100
    with evaluating(own.twin), torch.no_grad():
        found, count = own.twin(ids, labels)
        logits = own.twin(ids).double()
    exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
    shifted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    evidence = {"loss": float(found), "by the formula": exact, "targets": int(count), "expected": labels.numel() // 2}
    if int(count) != labels.numel() // 2:
        return Finding("fail", evidence, "ignored labels are counted", "count only labels other than -100")
    is_shifted = abs(float(found) - shifted.item()) < 1e-3 * exact < abs(float(found) - exact)
    return judge(
        abs(float(found) / exact - 1) <= (1e-4 if own.dtype == torch.float32 else 2e-2),
        "labels are shifted twice" if is_shifted else "the loss is not the cross-entropy of the labels",
        "labels[t] is the token after input_ids[t] already: the loss must not shift them",
        evidence=evidence,
    )


def check_ignored(own: Own) -> Finding:
    """Change the hidden states of ignored labels: neither loss nor gradient may notice."""
    generator = torch.Generator().manual_seed(own.twin_probe.seed)
    weight = own.twin.lm_head.weight.detach().clone().requires_grad_()
    hidden = torch.randn(1, 16, weight.shape[1], generator=generator).to(weight)
    labels = torch.arange(16, device=weight.device).unsqueeze(0) % weight.shape[0]
    labels[:, 8:] = -100
    gradients = []
    for scale in (1.0, 3.0):
        states = torch.cat((hidden[:, :8], hidden[:, 8:] * scale), 1).requires_grad_()
        total, _ = next_token_loss(states, weight, labels)
        gradients.append((total.detach(), *torch.autograd.grad(total, (states, weight))))
    (one, at_states, first), (other, _, second) = gradients
    leak = max(largest(at_states[:, 8:]), largest(first - second), largest(one - other))
    return judge(
        leak == 0,
        "positions without a target contribute to the loss or its gradient",
        "look at how the label -100 is masked",
        evidence={"loss and gradient change by": leak},
    )


OWN_MODEL: list[Check[Own]] = [
    Check(
        "parameters",
        "model",
        "The model has the parameters of its config, and embedding and head are one weight if it says so.",
        "Parameters are counted, and compared with the arithmetic of `smollm2 plan`.",
        "Two parameters of the same size that were exchanged.",
        check_parameters,
    ),
    Check(
        "reference",
        "model",
        "The model computes the formulas of its papers.",
        "The logits of a two-layer twin are compared with an independent implementation in float64, and the rotary tables of the model with the formula.",
        "What only the weights of the model itself would show.",
        check_reference,
        on_twin=True,
    ),
    Check(
        "precision",
        "model",
        "16 bits change the logits by rounding only.",
        "The model's logits in the run's precision are compared with float32.",
        "What only long inputs would show.",
        check_precision,
    ),
    Check(
        "initial loss",
        "model",
        "A new model knows nothing, and is not far from knowing nothing.",
        "The loss on random tokens is compared with ln V + d std² / 2.",
        "A wrong initialization that leaves the logits' variance as it is.",
        check_initial_loss,
    ),
    Check(
        "loss",
        "loss and step",
        "The loss is the cross-entropy of the label of each position, and shifts nothing.",
        "It is computed once more from the logits, with every second label ignored.",
        "Labels that are wrong in the data; the check `targets` looks at the data.",
        check_loss,
        on_twin=True,
    ),
    Check(
        "ignored labels",
        "loss and step",
        "Positions without a target contribute neither to the loss nor to the gradient.",
        "The hidden states of ignored labels are changed.",
        "-",
        check_ignored,
        on_twin=True,
    ),
]
