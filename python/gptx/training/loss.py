"""Mean cross-entropy of a linear head without the logits in memory.

The logits of a training batch, ``[B T, V]``, are the largest array of a small GPT and are read and
written several times. Here a few rows at a time go through the head, the softmax and both gradient
products while they are in the cache; only the gradients are kept until the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_BYTES = 8 << 20  # float32 logits at a time: within the last-level cache of a small CPU


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, with_gradients: bool
    ) -> Tensor:
        n_rows, wide = x.shape[0], torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        grad_x = torch.empty_like(x) if with_gradients else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if with_gradients else None
        chunk = max(16, _CHUNK_BYTES // (wide.itemsize * weight.shape[0]))
        for start in range(0, n_rows, chunk):
            rows, target = x[start : start + chunk], targets[start : start + chunk, None]
            logits = (rows @ weight.T).to(wide)
            log_sum = logits.logsumexp(1, keepdim=True)
            total += (log_sum - logits.gather(1, target)).sum(dtype=torch.float64)
            if grad_x is None or grad_weight is None:
                continue
            grad = logits.sub_(log_sum).exp_()  # softmax(logits), less 1 at the target
            grad.scatter_add_(1, target, torch.full_like(log_sum, -1.0))
            grad = grad.to(x.dtype)
            grad_x[start : start + chunk] = grad @ weight
            grad_weight += grad.T @ rows
        if with_gradients:
            ctx.save_for_backward(grad_x, grad_weight)
        ctx.n_rows, ctx.weight_dtype = n_rows, weight.dtype
        return (total / n_rows).to(wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        scale = grads[0] / ctx.n_rows
        weight = (grad_weight * scale).to(ctx.weight_dtype)
        return (grad_x * scale).to(grad_x.dtype), weight, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """``cross_entropy(x @ weight.T, targets)``, in the autocast dtype where autocast is on.

    Args:
        x: ``[N, C]``.
        weight: ``[V, C]``.
        targets: int64 ``[N]``.

    Returns:
        A scalar: the mean over the N rows, in nats.
    """
    device, with_gradients = x.device.type, torch.is_grad_enabled()
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(x, weight, targets, with_gradients)  # type: ignore[no-untyped-call]
    return loss
