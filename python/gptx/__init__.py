"""gptx runs a GPT inside a Python program: exact, fast, and without torch or a network."""

from gptx import guided, tasks
from gptx.branch import Branch
from gptx.classification import Classification
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
    "generate",
    "guided",
    "load",
    "tasks",
]
