"""transformers' GPT2LMHeadModel in torch: eager in float32 and bfloat16, compiled in float32.

Greedy decoding is a plain loop on the model and its cache: `generate` of transformers does the same
and adds its own bookkeeping to every token, so this is the faster way. Compiled are, as there, the
steps after the prompt; they are compiled in the warm-up, not in the time to load.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import Cache, DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

from gptx.config import GPTConfig
from peers import UnavailableError
from peers.weights import canonical_weights, pad_left

_COMPILED = "float32-compiled"


class Peer:
    def __init__(self, path: str, threads: int, variant: str) -> None:
        torch.set_num_threads(threads)
        dtype = torch.bfloat16 if variant == "bfloat16" else torch.float32
        self._model = GPT2LMHeadModel.from_pretrained(path, dtype=dtype).eval()
        self._compiled = variant == _COMPILED
        self._step = torch.compile(self._model, dynamic=False) if self._compiled else self._model
        self._caches: dict[tuple[int, int], StaticCache] = {}

    @staticmethod
    def prepare(model_path: str, folder: Path, variant: str) -> str:
        """A Hugging Face folder with the weights in float32, the same for every variant."""
        if variant == _COMPILED and not (shutil.which("g++") or shutil.which("clang++")):
            raise UnavailableError("torch.compile needs a C++ compiler")
        if variant == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            raise UnavailableError("torch takes minutes for a prompt in bfloat16 on this CPU")
        path = folder / "float32"
        if not path.exists():
            path.mkdir()
            config, weights = canonical_weights(model_path)
            state = {}
            for name, value in weights.items():
                if value.ndim == 2 and (".attn." in name or ".mlp." in name):
                    value = value.T  # transformers keeps these matrices as [in, out]
                key = name if name.startswith("lm_head") else f"transformer.{name}"
                state[key] = torch.from_numpy(np.array(value, order="C"))
            save_file(state, path / "model.safetensors", metadata={"format": "pt"})
            _config(config).save_pretrained(path)
        return str(path)

    @staticmethod
    def versions() -> dict[str, str]:
        return {"transformers": transformers.__version__, "torch": torch.__version__}

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
        ids, mask = map(torch.from_numpy, pad_left(prompts))
        batch, width = ids.shape
        positions = (mask.cumsum(1) - 1).clamp_(min=0)
        ragged = not bool(mask.all())
        mask = torch.cat([mask, mask.new_ones(batch, n)], dim=1)
        cache = self._new_cache(batch, width + n)
        chosen: list[torch.Tensor] = []
        step = self._model
        while True:
            seen = width + n if self._compiled else width + len(chosen)
            out = step(
                ids,
                cache,
                attention_mask=mask[:, :seen] if ragged else None,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
            )
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            chosen.append(ids)
            if len(chosen) == n:
                return torch.cat(chosen, dim=1).tolist()
            positions = positions[:, -1:] + 1
            step = self._step

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return self._model(torch.tensor([list(ids)])).logits[0].float().numpy()

    def _new_cache(self, batch: int, capacity: int) -> Cache:
        """Empty. A compiled step wants the same buffers each time; eager is faster with what grows.

        The positions of a static cache that are not filled yet are hidden by the causal mask.
        """
        if not self._compiled:
            return DynamicCache(config=self._model.config)
        if (batch, capacity) not in self._caches:
            cache = StaticCache(config=self._model.config, max_cache_len=capacity)
            self._caches[batch, capacity] = cache
        self._caches[batch, capacity].reset()
        return self._caches[batch, capacity]


def _config(config: GPTConfig) -> GPT2Config:
    return GPT2Config(
        architectures=["GPT2LMHeadModel"],
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        n_inner=config.n_inner,
        activation_function=config.activation,
        layer_norm_epsilon=config.layer_norm_epsilon,
        scale_attn_weights=config.scale_attn_weights,
        scale_attn_by_inverse_layer_idx=config.scale_attn_by_inverse_layer_idx,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=None,
    )
