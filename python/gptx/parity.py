"""How far a model file is from the torch model of the same checkpoint.

Both run the same prompts; the file is measured as it will be used, after packing, rounding and
quantization, on the kernels of this machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gptx.config import GPTConfig
from gptx.errors import UnsupportedError
from gptx.modelfile import CLASS_HEAD

_LENGTHS = (1, 17, 64, 128)


def prompts(config: GPTConfig) -> list[list[int]]:
    """Four prompts of token ids, the same for the same config."""
    result = []
    for seed, length in enumerate(_LENGTHS):
        # A multiplicative hash: spread over the vocabulary, without a random generator.
        ids = [
            (seed * 0x85EBCA6B + i * 0x9E3779B1 + 1) % 2**32 * config.vocab_size >> 32
            for i in range(min(length, config.block_size))
        ]
        result.append(ids)
    return result


def measure(
    path: str | os.PathLike[str], config: GPTConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, object]:
    """Compares a model file with ``gptx.training.model.GPT`` of the same tensors, in float32.

    Args:
        path: the ``.gptx`` file.
        config: its config.
        tensors: the canonical tensors it was made of.

    Returns:
        ``max_logit_difference``: the largest |logit - reference| of any token; ``max_logit``: the
        largest |reference|, its scale; ``mean_kl``: the mean over positions of KL(reference, file)
        in nats; ``top1_agreement``: share of positions with the same most likely token; ``tokens``:
        number of positions; ``reference``: name and version of the reference.

    Raises:
        UnsupportedError: torch is not installed, or there is not the memory for a second model.
    """
    reference = _reference(config, tensors)
    from gptx.loading import load

    model = load(path, verify=False)
    difference, scale, kl, same, count = 0.0, 0.0, 0.0, 0, 0
    for ids in prompts(config):
        expected = reference.logits(ids)
        found = model.logits(ids).astype(np.float64)
        difference = max(difference, float(np.abs(found - expected).max()))
        scale = max(scale, float(np.abs(expected).max()))
        p, q = _log_softmax(expected), _log_softmax(found)
        kl += float((np.exp(p) * (p - q)).sum())
        same += int((found.argmax(-1) == expected.argmax(-1)).sum())
        count += len(ids)
    return {
        "max_logit_difference": difference,
        "max_logit": scale,
        "mean_kl": kl / count,
        "top1_agreement": same / count,
        "tokens": count,
        "reference": f"torch {reference.version}",
    }


def describe(report: Mapping[str, object]) -> str:
    """A report in one line."""
    return (
        f"parity with {report['reference']} on {report['tokens']} tokens: "
        f"max |dlogit| {report['max_logit_difference']:.2g} (of {report['max_logit']:.3g}), "
        f"mean KL {report['mean_kl']:.2g}, top-1 {100 * float(str(report['top1_agreement'])):.1f} %"
    )


class _Reference:
    """The torch model. Its parameters are the tensors as read, nothing is copied."""

    def __init__(self, config: GPTConfig, tensors: Mapping[str, np.ndarray]) -> None:
        import torch

        from gptx.training.model import GPT

        self.version = torch.__version__
        with torch.device("meta"):
            self._model = GPT(config).eval()
        names = [name for name in tensors if name != CLASS_HEAD]
        state = {name: torch.from_numpy(tensors[name]) for name in names}
        self._model.load_state_dict(state, assign=True)

    def logits(self, ids: list[int]) -> np.ndarray:
        """float64 ``[T, V]``."""
        import torch

        with torch.inference_mode():
            logits: np.ndarray = self._model(torch.tensor([ids]))[0][0].double().numpy()
        return logits


def _reference(config: GPTConfig, tensors: Mapping[str, np.ndarray]) -> _Reference:
    need, have = 4 * config.n_params, _available_memory()
    # The file's own pages, the activations and the logits want room beside the weights.
    if have is not None and 2 * need > have:
        raise UnsupportedError(f"the comparison needs {2 * need:,} bytes, {have:,} are free")
    try:
        return _Reference(config, tensors)
    except ImportError as error:
        raise UnsupportedError(f"torch is not installed ({error})") from None


def _available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return 1024 * int(kilobytes)
    except (OSError, StopIteration, ValueError):
        return None


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
