"""GPT-2 in torch: the reference of the checks in float32, and the peers in bfloat16 and int8.

Letters as in docs/architecture.md: B sequences, T tokens of each, C channels, H heads of D, V
vocabulary; S positions that the cache holds. It has the activation and the scale of GPT-2 alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptx.config import GPTConfig


class LayerCache(NamedTuple):
    """Keys and values of one layer, [B, H, S, D], written in place."""

    keys: Tensor
    values: Tensor


class Linear(nn.Module):
    """x [..., K] to x W^T + b [..., N]; the weight [N, K] in the model's type, or in int8 with a
    scale for each output, which is multiplied in after the product as in gpt-fast."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, int8: bool):
        super().__init__()
        scale = None
        if int8:
            scale = weight.abs().amax(dim=1) / 127
            weight = torch.round(weight / scale[:, None]).to(torch.int8)
        self.register_buffer("weight", weight if int8 else weight.to(dtype))
        self.register_buffer("scale", None if scale is None else scale.to(dtype))
        self.register_buffer("bias", None if bias is None else bias.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return F.linear(x, self.weight, self.bias)
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


class Norm(nn.Module):
    """Layer norm over C."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype, epsilon: float):
        super().__init__()
        self.register_buffer("weight", weight.to(dtype))
        self.register_buffer("bias", bias.to(dtype))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


class Block(nn.Module):
    """One block, from normalized rows to the rows that its successor wants normalized.

    Cut in this place, a compiled block fuses each residual with the norm that follows it.
    """

    def __init__(self, n_head: int, modules: Mapping[str, nn.Module]):
        super().__init__()
        self.n_head = n_head
        for name in ("c_attn", "attn_c_proj", "ln_2", "c_fc", "mlp_c_proj", "ln_next"):
            self.add_module(name, modules[name])

    def forward(
        self,
        x: Tensor,  # [B, T, C], the residual stream
        h: Tensor,  # [B, T, C], x normalized
        cache: LayerCache | None,
        positions: Tensor,  # [T]
        mask: Tensor | None,  # [1, 1, 1, S], what T = 1 tokens see of the cache; None: a prompt
    ) -> tuple[Tensor, Tensor]:
        x = x + self.attn_c_proj(self.attention(h, cache, positions, mask))
        y = F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")
        x = x + self.mlp_c_proj(y)
        return x, self.ln_next(x)

    def attention(
        self, h: Tensor, cache: LayerCache | None, positions: Tensor, mask: Tensor | None
    ) -> Tensor:
        b, t, c = h.shape
        q, k, v = (
            part.view(b, t, self.n_head, -1).transpose(1, 2)
            for part in self.c_attn(h).split(c, dim=2)
        )
        if cache is not None:
            cache.keys[:, :, positions] = k
            cache.values[:, :, positions] = v
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, cache.keys, cache.values, attn_mask=mask)
        return y.transpose(1, 2).reshape(b, t, c)


class Gpt(nn.Module):
    """A GPT-2 made of canonical tensors, as `gptx.modelfile.canonical_shapes` names them.

    Args:
        tensors: float32; they are rounded to ``dtype``, those of linear layers to int8 if asked.
    """

    def __init__(
        self,
        config: GPTConfig,
        tensors: Mapping[str, NDArray[np.float32]],
        device: str,
        dtype: torch.dtype = torch.float32,
        *,
        int8: bool = False,
    ):
        super().__init__()
        self.config = config

        def tensor(name: str) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(tensors[name])).to(device)

        def linear(name: str) -> Linear:
            weight, bias = tensor(f"{name}.weight"), tensor(f"{name}.bias")
            return Linear(weight, bias, dtype, int8=int8)

        def norm(name: str) -> Norm:
            weight, bias = tensor(f"{name}.weight"), tensor(f"{name}.bias")
            return Norm(weight, bias, dtype, config.layer_norm_epsilon)

        wte = tensor("wte.weight")
        self.register_buffer("wte", wte.to(dtype))
        self.register_buffer("wpe", tensor("wpe.weight").to(dtype))
        self.ln_first = norm("h.0.ln_1")
        self.blocks = nn.ModuleList()
        for i in range(config.n_layer):
            last = i + 1 == config.n_layer
            parts = {
                "c_attn": linear(f"h.{i}.attn.c_attn"),
                "attn_c_proj": linear(f"h.{i}.attn.c_proj"),
                "ln_2": norm(f"h.{i}.ln_2"),
                "c_fc": linear(f"h.{i}.mlp.c_fc"),
                "mlp_c_proj": linear(f"h.{i}.mlp.c_proj"),
                "ln_next": norm("ln_f" if last else f"h.{i + 1}.ln_1"),
            }
            self.blocks.append(Block(config.n_head, parts))
        head = wte if config.tie_word_embeddings else tensor("lm_head.weight")
        self.lm_head = Linear(head, None, dtype, int8=int8)

    def embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens [B, T] at positions [T], the residual stream [B, T, C] and it normalized."""
        x = self.wte[tokens] + self.wpe[positions]
        return x, self.ln_first(x)

    def choose(self, h: Tensor) -> Tensor:
        """The greedy tokens [B, 1] after normalized rows [B, T, C]."""
        return self.lm_head(h[:, -1]).argmax(dim=-1, keepdim=True)

    def logits(self, ids: NDArray[np.int32]) -> Tensor:
        """Of every position of one sequence, [T, V]."""
        tokens = torch.from_numpy(ids).to(self.wte.device, torch.long)[None]
        positions = torch.arange(len(ids), device=tokens.device)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            x, h = self.embed(tokens, positions)
            for block in self.blocks:
                x, h = block(x, h, None, positions, None)
            return self.lm_head(h[0])

    def make_cache(self, batch: int, positions: int) -> list[LayerCache]:
        """Room for so many sequences and positions, of every layer."""
        shape = (batch, self.config.n_head, positions, self.config.head_size)
        zeros = [self.wte.new_zeros(shape) for _ in range(2 * self.config.n_layer)]
        return [LayerCache(*pair) for pair in zip(zeros[::2], zeros[1::2], strict=True)]
