"""llama.cpp by the C interface that llama-cpp-python wraps, whose own classes know one sequence."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from gguf.quants import quantize
from numpy.typing import NDArray

from gptx.config import GPTConfig
from peers import UnavailableError
from peers.weights import CanonicalWeights, attention_scale, canonical_weights

_NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_CONTEXT_STEP = 256  # what llama.cpp rounds a context up to
_FLASH_ATTENTION = {
    "on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}


class Peer:
    def __init__(self, path: str, threads: int, variant: str) -> None:
        self._threads = threads
        # Float16, llama.cpp's own choice, except where everything is to be float32.
        self._cache_type = llama_cpp.GGML_TYPE_F32 if variant == "f32" else llama_cpp.GGML_TYPE_F16
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp: expected a GPT-2 model in {path}, could not load it")
        self._block_size = llama_cpp.llama_model_n_ctx_train(self._model)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._contexts: dict[tuple[int, int], ctypes.c_void_p] = {}
        self._context(1, self._block_size)

    def __del__(self) -> None:
        for context in self._contexts.values():
            llama_cpp.llama_free(context)
        if self._model:
            llama_cpp.llama_model_free(self._model)

    @staticmethod
    def prepare(model_path: str, folder: Path, variant: str) -> str:
        path = folder / f"{variant}.gguf"
        if not path.exists():
            _write(*canonical_weights(model_path), variant.upper(), path)
        return str(path)

    @staticmethod
    def versions() -> dict[str, str]:
        return {"llama-cpp-python": llama_cpp.__version__}

    def generate(self, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
        longest = max(map(len, prompts)) + n
        capacity = self._block_size if len(prompts) == 1 else longest
        context = self._context(len(prompts), capacity)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        positions = [0] * len(prompts)
        chosen: list[list[int]] = []
        new: Sequence[Sequence[int]] = prompts
        while True:
            best = self._decode(context, new, positions).argmax(-1).tolist()
            chosen.append(best)
            if len(chosen) == n:
                return [list(tokens) for tokens in zip(*chosen, strict=True)]
            positions = [p + len(tokens) for p, tokens in zip(positions, new, strict=True)]
            new = [[token] for token in best]

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        context = self._context(1, self._block_size)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        return self._decode(context, [ids], [0], every=True).copy()

    def _context(self, sequences: int, capacity: int) -> ctypes.c_void_p:
        """For so many sequences of so many tokens; made on first use, the single one at load."""
        capacity = -(-capacity // _CONTEXT_STEP) * _CONTEXT_STEP
        if (sequences, capacity) not in self._contexts:
            params = llama_cpp.llama_context_default_params()
            params.n_ctx = params.n_batch = sequences * capacity
            params.n_seq_max = sequences
            params.n_threads = params.n_threads_batch = self._threads
            params.flash_attn_type = _FLASH_ATTENTION[os.environ["LLAMA_ARG_FLASH_ATTN"]]
            params.type_k = params.type_v = self._cache_type
            context = llama_cpp.llama_init_from_model(self._model, params)
            if not context:
                raise RuntimeError(f"llama.cpp: no context for {sequences} times {capacity} tokens")
            self._contexts[sequences, capacity] = context
        return self._contexts[sequences, capacity]

    def _decode(
        self,
        context: ctypes.c_void_p,
        new: Sequence[Sequence[int]],
        positions: Sequence[int],
        *,
        every: bool = False,
    ) -> NDArray[np.float32]:
        """Logits [K, V] of the last new token of each sequence, or of ``every`` one."""
        batch = llama_cpp.llama_batch_init(sum(map(len, new)), 0, 1)
        for sequence, (tokens, start) in enumerate(zip(new, positions, strict=True)):
            for i, token in enumerate(tokens):
                at = batch.n_tokens
                batch.token[at] = token
                batch.pos[at] = start + i
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = sequence
                batch.logits[at] = every or i == len(tokens) - 1
                batch.n_tokens += 1
        status = llama_cpp.llama_decode(context, batch)
        rows = batch.n_tokens if every else len(new)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama.cpp: llama_decode returned {status}")
        pointer = llama_cpp.llama_get_logits(context)
        return np.ctypeslib.as_array(pointer, (rows, self._vocab_size))


def _write(config: GPTConfig, weights: CanonicalWeights, kind: str, path: Path) -> None:
    """A GGUF file whose matrices, the tied embedding too, are all of one type.

    Raises:
        UnavailableError: llama.cpp's GPT-2 has neither this activation nor this attention scale.
    """
    last = config.n_layer - 1
    if config.activation != "gelu_new":
        raise UnavailableError(f"its GPT-2 has gelu_new, not {config.activation}")
    if attention_scale(config, last) != config.head_size**-0.5:
        raise UnavailableError("its GPT-2 scales attention by the head size alone")
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    for name, value in weights.items():
        is_matrix = value.ndim == 2 and name != "wpe.weight"
        kind_here = gguf.GGMLQuantizationType[kind if is_matrix else "F32"]
        data = quantize(np.ascontiguousarray(value), kind_here)
        writer.add_tensor(_gguf_name(name), data, raw_dtype=kind_here)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    base, _, part = name.rpartition(".")
    if base.startswith("h."):
        _, layer, base = base.split(".", 2)
        return f"blk.{layer}.{_NAMES[base]}.{part}"
    return f"{_NAMES[base]}.{part}"
