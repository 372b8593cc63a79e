"""CTranslate2's Generator. Its activations stay float32; int8 multiplies quantize them by row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ctranslate2
import numpy as np
from ctranslate2.specs import common_spec, transformer_spec
from numpy.typing import NDArray

from gptx.config import GPTConfig
from peers.weights import CanonicalWeights, attention_scale, canonical_weights

_ACTIVATIONS = {
    "gelu_new": common_spec.Activation.GELUTanh,
    "gelu": common_spec.Activation.GELU,
    "relu": common_spec.Activation.RELU,
}
_SPECIAL = ("<unk>", "<s>", "</s>")  # CTranslate2 wants them; beyond the ids of the model


class Peer:
    def __init__(self, path: str, threads: int, variant: str) -> None:
        self._model = ctranslate2.Generator(
            path, device="cpu", compute_type=variant, inter_threads=1, intra_threads=threads
        )

    @staticmethod
    def prepare(model_path: str, folder: Path, variant: str) -> str:
        path = folder / variant
        if not path.exists():
            spec = _spec(*canonical_weights(model_path))
            spec.validate()
            spec.optimize(quantization=variant)
            path.mkdir()
            spec.save(str(path))
        return str(path)

    @staticmethod
    def versions() -> dict[str, str]:
        return {"ctranslate2": ctranslate2.__version__}

    def generate(self, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
        results = self._model.generate_batch(
            [[str(token) for token in prompt] for prompt in prompts],
            max_length=n,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return np.array(self._model.forward_batch([list(ids)]))[0]


def _spec(
    config: GPTConfig, weights: CanonicalWeights
) -> transformer_spec.TransformerDecoderModelSpec:
    """What its converter makes of a GPT2LMHeadModel. Matrices are [out, in] as here."""
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config.n_layer, config.n_head, pre_norm=True, activation=_ACTIVATIONS[config.activation]
    )
    decoder = spec.decoder

    def norm(target: common_spec.LayerNormSpec, name: str) -> None:
        target.gamma, target.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]

    def linear(target: common_spec.LinearSpec, name: str) -> None:
        target.weight, target.bias = weights[f"{name}.weight"], weights[f"{name}.bias"]

    decoder.scale_embeddings = False
    decoder.embeddings.weight = weights["wte.weight"]
    decoder.position_encodings.encodings = weights["wpe.weight"]
    for i, layer in enumerate(decoder.layer):
        norm(layer.self_attention.layer_norm, f"h.{i}.ln_1")
        linear(layer.self_attention.linear[0], f"h.{i}.attn.c_attn")
        linear(layer.self_attention.linear[1], f"h.{i}.attn.c_proj")
        norm(layer.ffn.layer_norm, f"h.{i}.ln_2")
        linear(layer.ffn.linear_0, f"h.{i}.mlp.c_fc")
        linear(layer.ffn.linear_1, f"h.{i}.mlp.c_proj")
        layer.self_attention.queries_scale = np.float32(attention_scale(config, i))
    norm(decoder.layer_norm, "ln_f")
    head = "wte.weight" if config.tie_word_embeddings else "lm_head.weight"
    decoder.projection.weight = weights[head]  # equal to the embeddings: stored once
    spec.register_vocabulary([str(token) for token in range(config.vocab_size)])
    spec.config.unk_token, spec.config.bos_token, spec.config.eos_token = _SPECIAL
    return spec
