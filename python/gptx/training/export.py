"""The folder that transformers loads: ``GPT2LMHeadModel`` and ``AutoTokenizer``, unchanged.

Linear layers of the blocks are stored as transformers' Conv1D, ``[in, out]``. A file appears whole
or not at all, so that a folder is loadable at every moment after its first model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gptx.config import GPTConfig
from gptx.modelfile.atomic import AtomicFile
from gptx.training.bpe import Encoder
from gptx.training.data import END_OF_TEXT

WEIGHTS = "model.safetensors"


def write_file(path: Path, *parts: bytes | memoryview) -> None:
    """Replaces a file by the joined parts, crash-atomically.

    Raises:
        ConvertError: it cannot be written; the old file stands.
    """
    with AtomicFile(path, sum(len(part) for part in parts), force=True) as file:
        for part in parts:
            file.write(part)


def write_json(path: Path, value: object) -> None:
    """Replaces a file by indented JSON."""
    write_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_description(folder: Path, config: GPTConfig, encoder: Encoder, dropout: float) -> None:
    """Everything of the folder but the weights: configuration, tokenizer, end tokens."""
    ends: dict[str, object] = {}
    tokens: dict[str, str] = {}
    if encoder.eot_id is not None:
        ends = dict.fromkeys(("bos_token_id", "eos_token_id"), encoder.eot_id)
        tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    write_json(folder / "config.json", {**_config(config, dropout), **ends})
    write_json(folder / "generation_config.json", ends)
    about_tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.block_size,
        **tokens,
    }
    write_json(folder / "tokenizer_config.json", about_tokenizer)
    write_file(folder / "tokenizer.json", encoder.tokenizer.to_str(pretty=True).encode())


def write_weights(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Replaces ``model.safetensors`` by canonical float32 tensors in transformers' layout."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    parts: list[memoryview] = []
    offset = 0
    for name, tensor in tensors.items():
        array = np.ascontiguousarray(tensor.T if _is_conv1d(name) else tensor, dtype="<f4")
        key = name if name == "lm_head.weight" else f"transformer.{name}"
        end = offset + array.nbytes
        header[key] = {"dtype": "F32", "shape": array.shape, "data_offsets": [offset, end]}
        parts.append(array.data.cast("B"))
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_file(folder / WEIGHTS, len(text).to_bytes(8, "little"), text, *parts)


def _is_conv1d(name: str) -> bool:
    return name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def _config(config: GPTConfig, dropout: float) -> dict[str, object]:
    """``config.json`` of transformers' GPT-2."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": config.activation,
        "attn_pdrop": dropout,
        "embd_pdrop": dropout,
        "resid_pdrop": dropout,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_inner": config.n_inner,
        "n_layer": config.n_layer,
        "n_positions": config.block_size,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "scale_attn_weights": config.scale_attn_weights,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "float32",
        "vocab_size": config.vocab_size,
    }
