"""Optimizers, learning rate and precision of a training run."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import nn

from gptx.errors import UnsupportedError
from gptx.training.options import TrainOptions

_BETAS = (0.9, 0.95)
_MUON_MOMENTUM = 0.95
_TRIAL_SIZE = 512
_WORTHWHILE = 1.3


def build_optimizers(model: nn.Module, options: TrainOptions) -> list[torch.optim.Optimizer]:
    """AdamW that decays matrices only (Loshchilov and Hutter, 2019), or Muon and AdamW.

    Muon (Jordan et al., 2024) takes the matrices of the blocks, with updates scaled to the size of
    AdamW's (Liu et al., 2025). Each group keeps its peak rate as ``peak_lr``.

    Raises:
        UnsupportedError: this torch has no Muon.
    """
    parameters = dict(model.named_parameters())
    vectors = [p for p in parameters.values() if p.dim() < 2]
    matrices = [p for p in parameters.values() if p.dim() >= 2]
    optimizers: list[torch.optim.Optimizer] = []
    if options.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise UnsupportedError(f"optimizer: torch {torch.__version__} has no Muon; use adamw")
        matrices = [p for name, p in parameters.items() if p.dim() >= 2 and name[:2] != "h."]
        muon = torch.optim.Muon(
            [p for name, p in parameters.items() if p.dim() >= 2 and name[:2] == "h."],
            lr=options.matrix_lr or 2 * options.lr,
            weight_decay=options.weight_decay,
            momentum=_MUON_MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        )
        optimizers.append(muon)
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizers.append(torch.optim.AdamW(groups, lr=options.lr, betas=_BETAS))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(step: int, done: float, options: TrainOptions) -> float:
    """Learning rate as a part of its peak: a linear warm-up times a cosine (Loshchilov, 2017).

    Args:
        step: steps taken so far.
        done: part of the run that is over, 0 to 1.
        options: for ``warmup`` and ``floor``.
    """
    rise = min(1.0, (step + 1) / max(1, options.warmup))
    fall = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return rise * (options.floor + (1 - options.floor) * fall)


def set_lr(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Gives every group its peak rate times the factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def choose_device(device: str) -> torch.device:
    """``"auto"``: cuda where there is one, else cpu.

    Raises:
        UnsupportedError: torch does not know the device, or the machine has none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedError(f"device: torch cannot use {device!r}: {reason}") from error
    return chosen


def choose_precision(precision: str, device: torch.device) -> str:
    """``"auto"``: bfloat16 if it multiplies matrices 1.3 times as fast as float32 or faster."""
    if precision != "auto":
        return precision
    seconds = {dtype: _matmul_seconds(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    pays = seconds[torch.float32] >= _WORTHWHILE * seconds[torch.bfloat16]
    return "bfloat16" if pays else "float32"


def _matmul_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Best of a few tries, the first one left out."""
    matrix = torch.ones(_TRIAL_SIZE, _TRIAL_SIZE, dtype=dtype, device=device)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        (matrix @ matrix).sum().item()  # item() waits for the device
        times.append(time.perf_counter() - start)
    return min(times[1:])
