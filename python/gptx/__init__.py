"""gptx runs a GPT inside a Python program: exact, fast, and without torch or a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptx.branch import Branch
from gptx.config import GPTConfig
from gptx.errors import (
    ContextLengthError,
    ConvertError,
    DeviceError,
    GptxError,
    MissingExtraError,
    ModelFileError,
    NonFiniteLogitsError,
    OutOfMemoryError,
    ParameterError,
    TokenIdError,
    TokenizeError,
    TrainingError,
    UnsafeCheckpointError,
    UnsupportedError,
)
from gptx.generation import Generation, TokenLogprob
from gptx.loading import generate, load
from gptx.model import Model, Stream
from gptx.sampling import SamplingParams

if TYPE_CHECKING:
    from gptx import cuda, guided, tasks
    from gptx.classification import Classification
    from gptx.scoring import Choice, TokenScores

__version__ = "0.1.0"

__all__ = [
    "Branch",
    "Choice",
    "Classification",
    "ContextLengthError",
    "ConvertError",
    "DeviceError",
    "GPTConfig",
    "Generation",
    "GptxError",
    "MissingExtraError",
    "Model",
    "ModelFileError",
    "NonFiniteLogitsError",
    "OutOfMemoryError",
    "ParameterError",
    "SamplingParams",
    "Stream",
    "TokenIdError",
    "TokenLogprob",
    "TokenScores",
    "TokenizeError",
    "TrainingError",
    "UnsafeCheckpointError",
    "UnsupportedError",
    "cuda",
    "generate",
    "guided",
    "load",
    "tasks",
]

_LATER = {
    "Choice": "scoring",
    "Classification": "classification",
    "TokenScores": "scoring",
    "cuda": "",
    "guided": "",
    "tasks": "",
}


def __getattr__(name: str) -> object:
    """What few programs need is imported when it is asked for."""
    if name not in _LATER:
        raise AttributeError(f"module 'gptx' has no attribute {name!r}")
    from importlib import import_module

    module = import_module(f"gptx.{_LATER[name] or name}")
    return getattr(module, name) if _LATER[name] else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
