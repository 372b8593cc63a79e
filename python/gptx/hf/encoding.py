"""What a tokenizer returns: lists or arrays by name."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import numpy as np

from gptx.errors import ParameterError
from gptx.hf.arrays import is_torch, loaded_torch, to_torch


class BatchEncoding(UserDict[str, Any]):
    """``input_ids``, ``attention_mask`` and so on, by name or as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name == "data":  # not there yet while it is copied or unpickled
            raise AttributeError(name)
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Any:
        """An entry by its name, or a part of every entry by a slice."""
        if isinstance(key, slice):
            return {name: value[key] for name, value in self.data.items()}
        return self.data[key]

    def to(self, device: Any, **_: object) -> BatchEncoding:
        """Moves torch tensors; the model takes arrays where they are."""
        self.data = {
            name: value.to(device) if is_torch(value) else value
            for name, value in self.data.items()
        }
        return self

    def convert_to_tensors(self, tensor_type: str | None = None) -> BatchEncoding:
        """Makes arrays of the lists: "np", or "pt", which is numpy too where the script has not
        imported torch.

        Raises:
            ParameterError: another type, or rows of different lengths.
        """
        if tensor_type is None:
            return self
        kind = getattr(tensor_type, "value", tensor_type)
        if kind not in ("np", "pt"):
            raise ParameterError("return_tensors", tensor_type, "'np', 'pt' or None")
        for name, value in self.data.items():
            lengths = {len(row) for row in value if isinstance(row, list)}
            if len(lengths) > 1:
                allowed = "rows of one length: padding=True, and truncation=True where needed"
                raise ParameterError(name, f"lengths {sorted(lengths)}", allowed)
            array = np.asarray(value, dtype=np.int64)
            tensors = kind == "pt" and loaded_torch() is not None
            self.data[name] = to_torch(array) if tensors else array
        return self
