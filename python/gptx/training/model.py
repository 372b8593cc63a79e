"""GPT-2 in torch (Radford et al., 2019): the model that trains, and the reference of the tests.

Parameter names and shapes are the canonical ones of gptx (every matrix ``[out, in]``), so that
`GPT.load_canonical` and `GPT.canonical_tensors` are plain copies. Equal in meaning to
transformers' ``GPT2LMHeadModel``; no key/value cache, no beam search, no surprises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptx.config import GPTConfig
from gptx.errors import ConvertError

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


class Attention(nn.Module):
    """Causal self-attention with one fused projection for q, k and v."""

    def __init__(self, config: GPTConfig, layer: int, dropout: float) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.scale = 1.0
        if config.scale_attn_weights:
            self.scale /= math.sqrt(config.head_size)
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.dropout = dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        b, t, c = x.shape
        q, k, v = (
            part.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)  # [B, H, T, D]
            for part in self.c_attn(x).split(c, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, dropout_p=dropout
        )
        y = self.c_proj(y.transpose(1, 2).reshape(b, t, c))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers around the activation."""

    def __init__(self, config: GPTConfig, dropout: float) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[config.activation]
        self.dropout = dropout
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.c_proj(self.activation(self.c_fc(x))), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: GPTConfig, layer: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer, dropout)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        mlp: Tensor = self.mlp(self.ln_2(x))
        return x + mlp


class GPT(nn.Module):
    """The whole model, initialised as GPT-2: normal(0, 0.02), residual outputs / sqrt(2 L).

    Args:
        config: the shape.
        dropout: probability after the embeddings, the attention weights, and both residual
            branches; active in ``train()`` mode only.
    """

    def __init__(self, config: GPTConfig, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, i, dropout) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits of the next token at every position, and the mean loss if targets are given.

        Args:
            ids: int64 ``[B, T]``, ``T <= block_size``.
            targets: int64 ``[B, T]``, or None.

        Returns:
            logits ``[B, T, V]`` and the mean cross-entropy in nats (a scalar) or None.
        """
        x = self.hidden(ids)
        logits = F.linear(x, self.head_weight)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def hidden(self, ids: Tensor) -> Tensor:
        """What the head sees: ids ``[B, T]`` -> the final layer norm's output ``[B, T, C]``."""
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        x = F.dropout(x, self.dropout, self.training)
        for block in self.h:
            x = block(x)
        normalized: Tensor = self.ln_f(x)
        return normalized

    @property
    def head_weight(self) -> Tensor:
        """``[V, C]``: lm_head, or wte where they are tied."""
        return self.wte.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def load_canonical(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Copies canonical tensors in, cast to the parameters' dtype.

        Raises:
            ConvertError: a tensor is missing, superfluous or of another shape; nothing is copied.
        """
        parameters = dict(self.named_parameters())
        for name in sorted(parameters.keys() ^ set(tensors)):
            what = "missing" if name in parameters else "unknown"
            raise ConvertError(f"tensor {name} is {what}", tensor=name)
        arrays = {name: np.asarray(tensors[name]) for name in parameters}
        for name, array in arrays.items():
            expected = tuple(parameters[name].shape)
            if array.shape != expected:
                message = f"tensor {name}: expected shape {expected}, got {array.shape}"
                raise ConvertError(message, tensor=name)
        with torch.no_grad():
            for name, array in arrays.items():
                parameters[name].copy_(torch.tensor(array))

    def canonical_tensors(self) -> dict[str, np.ndarray]:
        """Canonical name -> float32 copy, every matrix as ``[out, in]``."""
        return {
            name: parameter.detach().to("cpu", torch.float32, copy=True).numpy()
            for name, parameter in self.named_parameters()
        }
