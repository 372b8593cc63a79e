"""The file from which an interrupted run goes on exactly: ``checkpoint.pt`` in the output folder.

It holds everything that the next step depends on. Batches and dropout are functions of (seed, step)
and need no place in it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from gptx.errors import ConvertError, ParameterError
from gptx.training.export import write_file

CHECKPOINT = "checkpoint.pt"
_VERSION = 1


@dataclass
class TrainState:
    """A run between two steps.

    Attributes:
        options: `TrainOptions.to_dict`.
        config: `GPTConfig.to_dict`.
        precision: the dtype in use, after "auto".
        mix: weights of the files, after their default.
        data: SHA-256 of the training tokens of each file.
        step: steps taken.
        seconds: wall-clock time of all sittings.
        best_loss, best_step: of the model in ``model.safetensors``; infinity and 0 before it.
        model: ``state_dict`` of the model.
        optimizers: ``state_dict`` of each optimizer.
    """

    options: dict[str, Any]
    config: dict[str, Any]
    precision: str
    mix: list[float]
    data: list[str]
    step: int
    seconds: float
    best_loss: float
    best_step: int
    model: dict[str, Any]
    optimizers: list[dict[str, Any]]


def save_state(folder: Path, state: TrainState) -> None:
    """Replaces ``checkpoint.pt``, crash-atomically.

    Raises:
        ConvertError: it cannot be written; the old file stands.
    """
    values = {field.name: getattr(state, field.name) for field in fields(state)}
    buffer = io.BytesIO()
    torch.save({"version": _VERSION, **values}, buffer)
    write_file(folder / CHECKPOINT, buffer.getbuffer())


def load_state(folder: Path) -> TrainState:
    """Reads ``checkpoint.pt``; nothing in it is executed.

    Raises:
        ParameterError: there is none.
        ConvertError: it is damaged or of another version.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise ParameterError("resume", str(folder), f"a folder that holds {CHECKPOINT}")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        version = values.pop("version")
        state = TrainState(**values)
    except Exception as error:  # torch raises many kinds for damaged files
        raise ConvertError(f"{path}: not a checkpoint of a training run: {error}") from error
    if version != _VERSION:
        raise ConvertError(f"{path}: version: expected {_VERSION}, got {version}")
    return state
