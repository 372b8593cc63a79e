"""transformers' GPT2LMHeadModel in torch's eager mode, float32, as its users run it.

Greedy decoding is a plain loop on the model and its cache: `generate` of transformers does the same
and adds its own bookkeeping to every token, so this is the faster way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from gptx import modelfile


class Peer:
    def __init__(self, path: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).eval()

    @staticmethod
    def prepare(model_path: str, folder: Path) -> str:
        """A Hugging Face folder with the weights as gptx computes with them, in float32."""
        model = modelfile.read(model_path)
        config = model.config
        state = {}
        for name in modelfile.canonical_shapes(config):
            value = model.weight(name)
            if value.ndim == 2 and (".attn." in name or ".mlp." in name):
                value = value.T  # transformers keeps these matrices as [in, out]
            key = name if name.startswith("lm_head") else f"transformer.{name}"
            state[key] = torch.from_numpy(np.array(value, order="C"))
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        GPT2Config(
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
        ).save_pretrained(folder)
        return str(folder)

    @staticmethod
    def versions() -> dict[str, str]:
        return {"transformers": transformers.__version__, "torch": torch.__version__}

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
        ids, mask = _pad_left(prompts)
        positions = mask.cumsum(1) - 1
        positions.clamp_(min=0)
        ragged = not bool(mask.all())
        cache = DynamicCache(config=self._model.config)
        chosen = []
        while True:
            out = self._model(
                input_ids=ids,
                attention_mask=mask if ragged else None,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            chosen.append(ids)
            if len(chosen) == n:
                return torch.cat(chosen, dim=1).tolist()
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = positions[:, -1:] + 1

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return self._model(input_ids=torch.tensor([list(ids)])).logits[0].numpy()


def _pad_left(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, T]; 1 in the mask where an id is real."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    return ids, mask
