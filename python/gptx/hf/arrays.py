"""Arrays of the caller: numpy, or torch where the script has imported it. torch is never loaded."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptx.errors import ParameterError

Array = Any
"""What a caller gives and gets: a numpy array, or a torch tensor where it gave one."""


def loaded_torch() -> Any:
    """The module torch if the script has imported it, else None."""
    return sys.modules.get("torch")


def is_torch(value: object) -> bool:
    torch = loaded_torch()
    return torch is not None and isinstance(value, torch.Tensor)


def device_of(*values: object) -> Any:
    """The device of the first torch tensor among the values; None: there is none."""
    return next((value.device for value in values if is_torch(value)), None)  # type: ignore


def to_numpy(value: Any) -> NDArray[Any]:
    """An array of what a caller gave: torch tensors on any device, arrays, nested lists."""
    return value.detach().cpu().numpy() if is_torch(value) else np.asarray(value)


def to_torch(array: NDArray[Any], device: Any = "cpu") -> Any:
    return loaded_torch().from_numpy(np.asarray(array, order="C")).to(device)


def given(array: NDArray[Any], device: Any) -> Array:
    """The array as the caller's kind: torch on ``device``, numpy where that is None."""
    return array if device is None else to_torch(array, device)


def matrix(name: str, value: Any) -> NDArray[np.int64]:
    """Integers ``[B, T]``, int64.

    Raises:
        ParameterError: it is no matrix of integers.
    """
    allowed = "integers of the shape [batch, length]"
    try:
        array = to_numpy(value)
    except ValueError:  # rows of different lengths
        raise ParameterError(name, value, allowed) from None
    if array.ndim != 2 or (array.dtype.kind not in "iub" and array.size):
        raise ParameterError(name, value, allowed)
    return array.astype(np.int64)
