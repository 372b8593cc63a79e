"""Where the seeds of sampling come from: the generators that a script seeds anyway."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from gptx.errors import ParameterError
from gptx.hf.arrays import loaded_torch


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seeds `random`, `numpy.random` and, where it is imported, torch.

    The ``do_sample`` calls that follow then give the same tokens in every run of the script; they
    are not the tokens of transformers, whose generator is another one.

    Args:
        seed: 0 to 2**32 - 1.
        deterministic: gptx always is; passed on to torch.
    """
    if not 0 <= seed < 2**32:
        raise ParameterError("seed", seed, "an integer from 0 to 2**32 - 1")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # the generator that scripts seed
    torch = loaded_torch()
    if torch is not None:
        torch.manual_seed(seed)
        if deterministic:
            torch.use_deterministic_algorithms(True)


def draw(device: Any) -> int:
    """A seed from torch's generator for callers of torch (``device`` is theirs), else numpy's."""
    if device is not None:
        return int(loaded_torch().randint(2**63 - 1, ()).item())
    return int(np.random.randint(2**63 - 1))  # noqa: NPY002  # as above
