"""GPT-2 as an ONNX graph of ONNX Runtime's fused operators; its own builder has none for GPT-2.

Inputs are ``ids [B, T]``, ``positions [B, T]``, ``rows [K]``, the rows of the flattened [B T] whose
logits are wanted, ``lengths [B]``, cached tokens of each sequence after this step less one, and
``total``, the most of them plus one. Keys and values ``[B, H, S, D]`` go in as ``past.*`` and come
out as ``present.*``, in the same buffers where the caller binds them so. ``logits`` are [K, V].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from gptx import quantize
from gptx.config import GPTConfig
from peers.rounding import pack_nibbles, quantize_blocks
from peers.weights import CanonicalWeights, attention_scale

BLOCK = 32
_MICROSOFT = "com.microsoft"
_INT8_ACTIVATIONS = 4  # MatMulNBits: accuracy_level


def write_graph(config: GPTConfig, weights: CanonicalWeights, kind: str, path: Path) -> None:
    """Writes ``path`` and, beside it, the tensors.

    Args:
        kind: how matrices are stored and multiplied: "float32", "int8-dynamic", "int8-blocks" or
            "int4-blocks".
    """
    graph = _Graph(config, weights, kind)
    graph.build()
    onnx.save_model(
        graph.model(),
        str(path),
        save_as_external_data=True,
        location=f"{path.name}.data",
        size_threshold=1024,
    )


def cache_names(n_layer: int, prefix: str) -> list[str]:
    return [f"{prefix}.{i}.{part}" for i in range(n_layer) for part in ("key", "value")]


class _Graph:
    def __init__(self, config: GPTConfig, weights: CanonicalWeights, kind: str) -> None:
        self._config = config
        self._weights = weights
        self._kind = kind
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: dict[str, onnx.TensorProto] = {}

    def build(self) -> None:
        config = self._config
        ids = self._node("Gather", [self._weight("wte.weight"), "ids"])
        positions = self._node("Gather", [self._weight("wpe.weight"), "positions"])
        stream, branch = ids, positions  # the norm adds the two
        for layer in range(config.n_layer):
            base = f"h.{layer}"
            normed, stream = self._add_and_norm(stream, branch, f"{base}.ln_1")
            qkv = self._linear(normed, f"{base}.attn.c_attn")
            attended = self._attention(qkv, layer)
            branch = self._linear(attended, f"{base}.attn.c_proj")
            normed, stream = self._add_and_norm(stream, branch, f"{base}.ln_2")
            hidden = self._activation(self._linear(normed, f"{base}.mlp.c_fc"))
            branch = self._linear(hidden, f"{base}.mlp.c_proj")
        normed, _ = self._add_and_norm(stream, branch, "ln_f")
        flat = self._node("Reshape", [normed, self._tensor("flat", [-1, config.n_embd])])
        wanted = self._node("Gather", [flat, "rows"])
        head = "wte" if config.tie_word_embeddings else "lm_head"
        self._linear(wanted, head, bias=False, output="logits")

    def model(self) -> onnx.ModelProto:
        config = self._config
        cache = ["B", config.n_head, "S", config.head_size]
        names = {kind: cache_names(config.n_layer, kind) for kind in ("past", "present")}
        inputs = {
            "ids": (TensorProto.INT64, ["B", "T"]),
            "positions": (TensorProto.INT64, ["B", "T"]),
            "rows": (TensorProto.INT64, ["K"]),
            "lengths": (TensorProto.INT32, ["B"]),
            "total": (TensorProto.INT32, []),
            **dict.fromkeys(names["past"], (TensorProto.FLOAT, cache)),
        }
        outputs = {
            "logits": (TensorProto.FLOAT, ["K", config.vocab_size]),
            **dict.fromkeys(names["present"], (TensorProto.FLOAT, cache)),
        }
        graph = helper.make_graph(
            self._nodes,
            "gpt2",
            [helper.make_tensor_value_info(name, *info) for name, info in inputs.items()],
            [helper.make_tensor_value_info(name, *info) for name, info in outputs.items()],
            list(self._tensors.values()),
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(_MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def _add_and_norm(self, stream: str, branch: str, name: str) -> tuple[str, str]:
        """Layer norm of the sum, and the sum."""
        output = f"{name}.normed"
        self._node(
            "SkipLayerNormalization",
            [stream, branch, self._weight(f"{name}.weight"), self._weight(f"{name}.bias")],
            [output, "", "", f"{name}.sum"],
            domain=_MICROSOFT,
            epsilon=self._config.layer_norm_epsilon,
        )
        return output, f"{name}.sum"

    def _attention(self, qkv: str, layer: int) -> str:
        """Causal attention over the cache, which it extends; q, k and v side by side in qkv."""
        output = f"h.{layer}.attended"
        past, present = (
            [f"{kind}.{layer}.{part}" for part in ("key", "value")] for kind in ("past", "present")
        )
        self._node(
            "GroupQueryAttention",
            [qkv, "", "", *past, "lengths", "total"],
            [output, *present],
            domain=_MICROSOFT,
            num_heads=self._config.n_head,
            kv_num_heads=self._config.n_head,
            scale=attention_scale(self._config, layer),
        )
        return output

    def _activation(self, value: str) -> str:
        if self._config.activation == "relu":
            return self._node("Relu", [value])
        form = "tanh" if self._config.activation == "gelu_new" else "none"
        return self._node("Gelu", [value], approximate=form)

    def _linear(self, value: str, name: str, *, bias: bool = True, output: str = "") -> str:
        """``value [.., K]`` by the weight ``name [N, K]``, plus its bias."""
        outputs = [output or f"{name}.out"]
        weight = self._weights[f"{name}.weight"]
        bias_name = self._weight(f"{name}.bias") if bias else ""
        if self._kind == "float32":
            product = self._node(
                "MatMul",
                [value, self._tensor(f"{name}.transposed", weight.T)],
                [f"{name}.product"] if bias else outputs,
            )
            return self._node("Add", [product, bias_name], outputs) if bias else product
        if self._kind == "int8-dynamic":
            q, scale, _ = quantize.quantize_rows(weight)
            inputs = [
                value,
                self._tensor(f"{name}.q", q.T),
                self._tensor(f"{name}.scale", scale),
                self._tensor(f"{name}.zero", np.zeros(len(scale), np.int8)),
                bias_name,
            ]
            return self._node("DynamicQuantizeMatMul", inputs, outputs, domain=_MICROSOFT)
        bits = 8 if self._kind == "int8-blocks" else 4
        q, scale = quantize_blocks(weight, bits, BLOCK)
        codes = self._tensor(f"{name}.q", q if bits == 8 else pack_nibbles(q))
        return self._node(
            "MatMulNBits",
            [value, codes, self._tensor(f"{name}.scale", scale), "", "", bias_name],
            outputs,
            domain=_MICROSOFT,
            K=weight.shape[1],
            N=weight.shape[0],
            bits=bits,
            block_size=BLOCK,
            accuracy_level=_INT8_ACTIVATIONS,
        )

    def _weight(self, name: str) -> str:
        return self._tensor(name, self._weights[name])

    def _tensor(self, name: str, value: NDArray | list[int]) -> str:
        if name not in self._tensors:
            array = np.ascontiguousarray(value)
            self._tensors[name] = numpy_helper.from_array(array, name)
        return name

    def _node(
        self,
        kind: str,
        inputs: list[str],
        outputs: list[str] | None = None,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        outputs = outputs or [f"{kind}.{len(self._nodes)}"]
        while not inputs[-1]:
            inputs = inputs[:-1]
        self._nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs[0]
