"""GPT-2 in float64 numpy: the slow, obviously right twin of every operation and of the model."""

from __future__ import annotations

import math

import numpy as np


def gelu_new(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def relu(x):
    return np.maximum(x, 0)


ACTIVATIONS = {"none": lambda x: x, "gelu_new": gelu_new, "gelu": gelu, "relu": relu}


def layer_norm(x, weight, bias, epsilon):
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + epsilon) * weight + bias


def linear(x, weight, bias):
    return x @ weight.T + bias


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(query, key, value, scale):
    """One head: query, key, value [T, D], causal."""
    scores = query @ key.T * scale
    hidden = np.triu(np.ones(scores.shape, bool), 1)
    return softmax(np.where(hidden, -np.inf, scores)) @ value


def forward(config, tensors, ids):
    """Logits [T, V] of the canonical tensors for ids [T]."""
    w = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    activation = ACTIVATIONS[config.activation]
    eps = config.layer_norm_epsilon
    head = config.head_size

    x = w["wte.weight"][ids] + w["wpe.weight"][: len(ids)]
    for i in range(config.n_layer):
        p = f"h.{i}."
        h = layer_norm(x, w[p + "ln_1.weight"], w[p + "ln_1.bias"], eps)
        qkv = linear(h, w[p + "attn.c_attn.weight"], w[p + "attn.c_attn.bias"])
        q, k, v = np.split(qkv, 3, axis=-1)
        scale = 1.0
        if config.scale_attn_weights:
            scale /= math.sqrt(head)
        if config.scale_attn_by_inverse_layer_idx:
            scale /= i + 1
        heads = [
            attention(q[:, a : a + head], k[:, a : a + head], v[:, a : a + head], scale)
            for a in range(0, config.n_embd, head)
        ]
        y = np.concatenate(heads, axis=-1)
        x = x + linear(y, w[p + "attn.c_proj.weight"], w[p + "attn.c_proj.bias"])
        h = layer_norm(x, w[p + "ln_2.weight"], w[p + "ln_2.bias"], eps)
        h = activation(linear(h, w[p + "mlp.c_fc.weight"], w[p + "mlp.c_fc.bias"]))
        x = x + linear(h, w[p + "mlp.c_proj.weight"], w[p + "mlp.c_proj.bias"])
    x = layer_norm(x, w["ln_f.weight"], w["ln_f.bias"], eps)
    head_name = "wte.weight" if config.tie_word_embeddings else "lm_head.weight"
    return x @ w[head_name].T
