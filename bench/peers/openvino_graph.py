"""GPT-2 as an OpenVINO graph with the KV cache as its state; optimum's exporter makes the same.

Inputs are ``ids [B, T]``, ``positions [B, T]``, ``mask [B, 1, T, S]``, added to the scores, and
``rows [K]``, the rows of the flattened [B T] whose logits are wanted, and ``beams [B]``, which
cached sequence each one continues. ``logits`` are [K, V].
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset15 as ops

from gptx import quantize
from gptx.config import GPTConfig
from peers.rounding import pack_nibbles, quantize_blocks
from peers.weights import CanonicalWeights, attention_scale

BLOCK = 128  # NNCF's group of 4-bit weights
_MIDDLE = 8  # the code of zero in 4 bits


def write_graph(config: GPTConfig, weights: CanonicalWeights, kind: str, path: Path) -> None:
    """Writes ``path`` (.xml) and the tensors beside it; ``kind`` is "float32", "int8" or "int4"."""
    model = _Graph(config, weights, kind).build()
    ov.save_model(model, path, compress_to_fp16=False)


class _Graph:
    def __init__(self, config: GPTConfig, weights: CanonicalWeights, kind: str) -> None:
        self._config = config
        self._weights = weights
        self._kind = kind
        self._matrices: dict[str, ov.Node] = {}
        self._assigns: list[ov.Node] = []
        self._ids = ops.parameter([-1, -1], np.int64, name="ids")
        self._positions = ops.parameter([-1, -1], np.int64, name="positions")
        self._mask = ops.parameter([-1, 1, -1, -1], np.float32, name="mask")
        self._rows = ops.parameter([-1], np.int64, name="rows")
        self._beams = ops.parameter([-1], np.int32, name="beams")

    def build(self) -> ov.Model:
        config = self._config
        embedded = ops.gather(self._matrix("wte.weight"), self._ids, np.int64(0))
        places = ops.gather(ops.constant(self._weights["wpe.weight"]), self._positions, np.int64(0))
        stream = ops.add(embedded, places)
        for layer in range(config.n_layer):
            base = f"h.{layer}"
            normed = self._norm(stream, f"{base}.ln_1")
            attended = self._attention(self._linear(normed, f"{base}.attn.c_attn"), layer)
            stream = ops.add(stream, self._linear(attended, f"{base}.attn.c_proj"))
            normed = self._norm(stream, f"{base}.ln_2")
            hidden = self._activation(self._linear(normed, f"{base}.mlp.c_fc"))
            stream = ops.add(stream, self._linear(hidden, f"{base}.mlp.c_proj"))
        flat = ops.reshape(stream, np.array([-1, config.n_embd]), special_zero=False)
        wanted = self._norm(ops.gather(flat, self._rows, np.int64(0)), "ln_f")
        head = "wte.weight" if config.tie_word_embeddings else "lm_head.weight"
        logits = ops.matmul(wanted, self._matrix(head), False, True)
        logits.output(0).set_names({"logits"})
        inputs = [self._ids, self._positions, self._mask, self._rows, self._beams]
        for value in inputs:
            value.output(0).set_names({value.friendly_name})
        return ov.Model([ops.result(logits)], self._assigns, inputs, "gpt2")

    def _norm(self, value: ov.Node, name: str) -> ov.Node:
        epsilon = self._config.layer_norm_epsilon
        normed = ops.mvn(value, np.array([-1]), True, epsilon, "inside_sqrt")
        scaled = ops.multiply(normed, self._weights[f"{name}.weight"])
        return ops.add(scaled, self._weights[f"{name}.bias"])

    def _attention(self, qkv: ov.Node, layer: int) -> ov.Node:
        """Attention over the cache, which it extends; q, k and v [B, T, C] side by side in qkv."""
        config = self._config
        heads = np.array([0, 0, config.n_head, config.head_size])
        q, k, v = (
            ops.transpose(ops.reshape(part, heads, special_zero=True), np.array([0, 2, 1, 3]))
            for part in ops.split(qkv, np.int64(2), 3).outputs()
        )
        k, v = self._extended(k, f"{layer}.key"), self._extended(v, f"{layer}.value")
        scale = ops.constant(np.float32(attention_scale(config, layer)))
        attended = ops.scaled_dot_product_attention(q, k, v, self._mask, scale)
        joined = ops.transpose(attended, np.array([0, 2, 1, 3]))
        return ops.reshape(joined, np.array([0, 0, config.n_embd]), special_zero=True)

    def _extended(self, new: ov.Node, name: str) -> ov.Node:
        """The cache [B, H, S, D] with the new tokens, which is also what it is from now on."""
        heads, size = self._config.n_head, self._config.head_size
        batch = ops.gather(ops.shape_of(self._ids), np.array([0]), np.int64(0))
        shape = ops.concat([batch, ops.constant(np.array([heads, 0, size]))], 0)
        empty = ops.broadcast(np.float32(0), shape)
        past = ops.read_value(empty, name, ov.Type.f32, ov.PartialShape([-1, heads, -1, size]))
        joined = ops.concat([ops.gather(past, self._beams, np.int64(0)), new], 2)
        self._assigns.append(ops.assign(joined, name))
        return joined

    def _activation(self, value: ov.Node) -> ov.Node:
        if self._config.activation == "relu":
            return ops.relu(value)
        return ops.gelu(value, "tanh" if self._config.activation == "gelu_new" else "erf")

    def _linear(self, value: ov.Node, name: str) -> ov.Node:
        product = ops.matmul(value, self._matrix(f"{name}.weight"), False, True)
        return ops.add(product, self._weights[f"{name}.bias"])

    def _matrix(self, name: str) -> ov.Node:
        """A weight [N, K] as float32; what stands between it and its codes the plugin fuses."""
        if name not in self._matrices:
            self._matrices[name] = self._compressed(self._weights[name])
        return self._matrices[name]

    def _compressed(self, weight: NDArray[np.float32]) -> ov.Node:
        if self._kind == "float32":
            return ops.constant(weight)
        if self._kind == "int8":
            q, scale, _ = quantize.quantize_rows(weight)
            return ops.multiply(ops.convert(ops.constant(q), "f32"), scale[:, None])
        n, k = weight.shape
        q, scale = quantize_blocks(weight, 4, math.gcd(k, BLOCK))
        codes = ops.convert(_nibbles(pack_nibbles(q), q.shape), "f32")
        middle = np.array([_MIDDLE], dtype=np.uint8)
        zero = ops.convert(_nibbles(middle, (1, 1, 1)), "f32")
        blocks = ops.multiply(ops.subtract(codes, zero), scale[..., None])
        return ops.reshape(blocks, np.array([n, k]), special_zero=False)


def _nibbles(packed: NDArray[np.uint8], shape: tuple[int, ...]) -> ov.Node:
    """A constant of 4-bit codes that owns its memory."""
    tensor = ov.Tensor(ov.Type.u4, ov.Shape(shape))
    tensor.data[:] = packed.ravel()
    return ops.constant(tensor)
