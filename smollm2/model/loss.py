"""Next-token loss as (sum, count), computed without having the logits of all tokens in memory at once.

The output head and the cross-entropy are one `autograd.Function` that processes the tokens in chunks. The matrix
product is in the compute dtype, log-sum-exp and sum are in float32, and the gradients are computed while the chunk's
logits are in memory. At a vocabulary of 49,152 it needs a tenth of the memory of the plain form (benchmarks/README.md).
"""

import torch
from torch import Tensor

from smollm2.config.schema import IGNORE_INDEX


def next_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    z_loss: float = 0.0,
    gradient_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sum over targets of -log softmax(hidden weight^T)[label] in float32, and the number of targets.

    hidden (..., C), weight (V, C), labels (...) int64, which are -100 if there is no target. `z_loss` adds the gradient
    of z_loss * logsumexp^2 for each target (PaLM, arXiv 2204.02311, section 5); the returned value is the cross-entropy
    alone, so losses are comparable between runs. Only first derivatives are supported. Gradients are multiplied by
    `gradient_scale` when they are computed and divided by it in the backward pass. If it includes fp16's loss scale, a
    smaller loss scale also prevents an overflow in the weight's gradient.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    labels = labels.reshape(-1)
    rows = hidden.reshape(-1, hidden.shape[-1])
    wants_gradient = torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad)
    total: Tensor = ChunkedLoss.apply(rows, weight, labels, z_loss, gradient_scale, wants_gradient)  # type: ignore[no-untyped-call]
    return total, (labels != IGNORE_INDEX).sum()


class ChunkedLoss(torch.autograd.Function):
    """Computes the gradients of hidden and weight chunk by chunk in the forward pass; backward only scales them."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        z_loss: float,
        gradient_scale: Tensor | None,
        wants_gradient: bool,
    ) -> Tensor:
        """Return the loss summed over targets, in float32."""
        chunk = 8192 if hidden.is_cuda else 512
        head = weight.detach().to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if wants_gradient else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_gradient else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                rows, targets = hidden[start : start + chunk], labels[start : start + chunk]
                logits = (rows @ head.T).float()
                kept = targets != IGNORE_INDEX
                index = targets.clamp_min(0).unsqueeze(-1)
                log_probabilities = logits.log_softmax(-1)
                chosen = log_probabilities.gather(-1, index)
                total -= chosen.squeeze(-1).masked_fill(~kept, 0.0).sum()
                if grad_hidden is None or grad_weight is None:
                    continue
                gradient = log_probabilities.exp_()
                if z_loss:
                    log_normalizer = logits.gather(-1, index) - chosen
                    gradient.mul_(1 + 2 * z_loss * log_normalizer)
                del logits
                gradient.scatter_add_(-1, index, torch.full_like(index, -1, dtype=gradient.dtype))
                if gradient_scale is not None:
                    gradient.mul_(gradient_scale)
                gradient = gradient.to(hidden.dtype)
                if hidden.is_cuda or not kept.all():  # a pass over the logits that most batches do not need
                    gradient.masked_fill_(~kept.unsqueeze(-1), 0.0)
                torch.mm(gradient, head, out=grad_hidden[start : start + chunk])
                grad_weight += gradient.T @ rows
        if wants_gradient:
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype, ctx.gradient_scale = weight.dtype, gradient_scale
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:  # type: ignore[no-untyped-def]
        """Scale the gradients from the forward pass; autograd refuses a second pass through the same graph."""
        grad_hidden, grad_weight = ctx.saved_tensors
        if ctx.gradient_scale is not None:
            grad = grad / ctx.gradient_scale
        # In float32: rounding `grad` to 16 bits would give the whole gradient the same relative error of up to 0.4 %.
        grad_hidden = (grad_hidden.float() * grad).to(grad_hidden.dtype)
        return grad_hidden, (grad_weight * grad).to(ctx.weight_dtype), None, None, None, None
