"""The ``.gptx`` file: one model with its tokenizer, checked bit by bit. See docs/model-file.md."""

from gptx.modelfile.info import describe
from gptx.modelfile.layout import CLASS_HEAD, DTYPES, canonical_shapes, stored_tensors
from gptx.modelfile.reader import ModelFile, is_model_file, read, read_buffer, verify
from gptx.modelfile.writer import update, write

__all__ = [
    "CLASS_HEAD",
    "DTYPES",
    "ModelFile",
    "canonical_shapes",
    "describe",
    "is_model_file",
    "read",
    "read_buffer",
    "stored_tensors",
    "update",
    "verify",
    "write",
]
