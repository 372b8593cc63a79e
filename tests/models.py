"""Models for the tests: random ones of any shape, and the demo model in torch."""

from __future__ import annotations

import numpy as np

from gptx import _core
from gptx.config import GPTConfig
from gptx.modelfile import canonical_shapes
from gptx.modelfile.layout import restore, store

DEFAULT = dict(vocab_size=211, block_size=96, n_layer=2, n_head=2, n_embd=32, n_inner=128)


def make_config(**changes):
    values = DEFAULT | changes
    if "n_embd" in changes and "n_inner" not in changes:
        values["n_inner"] = 4 * changes["n_embd"]
    return GPTConfig(**values)


def random_tensors(config, seed=0, std=0.08):
    """Canonical tensors with every bias and gain away from its trivial value."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in canonical_shapes(config).items():
        values = rng.standard_normal(shape).astype(np.float32) * np.float32(std)
        if ".ln_" in name or name.startswith("ln_f"):
            values += np.float32(name.endswith("weight"))
        tensors[name] = values
    return tensors


def stored(config, tensors, dtype="float32"):
    out = {}
    for name in canonical_shapes(config):
        out |= store(config, dtype, name, tensors[name])
    return out


def rounded(config, tensors, dtype):
    """The float32 values that weights of a type stand for."""
    packed = stored(config, tensors, dtype)
    return {name: restore(config, dtype, name, packed) for name in canonical_shapes(config)}


def random_ids(config, n, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, n).astype(np.int32)


def make_engine(config, tensors, dtype="float32", **options):
    return _core.Engine(config.to_dict(), dtype, stored(config, tensors, dtype), **options)


GREEDY = dict(temperature=0.0)

# What a request has besides its sampling parameters.
REQUEST_FIELDS = (
    "min_new_tokens",
    "end_tokens",
    "forced_tokens",
    "forced_end",
    "slide",
    "lookup",
    "seconds",
    "held",
    "hidden",
    "wanted",
    "logits",
    "parent",
)


def submit(engine, ids, n, **params):
    """Submits a request for n tokens, greedy unless told otherwise."""
    params = GREEDY | params
    request = {name: params.pop(name) for name in REQUEST_FIELDS if name in params}
    return engine.submit(ids, sampling=params, max_new_tokens=n, **request)


def run(engine, requests):
    """Tokens of each request, all driven to their end together."""
    tokens = {request: [] for request in requests}
    running = set(requests)
    while running:
        for request, token, finish, *_ in engine.advance(sorted(running)):
            if token >= 0:
                tokens[request].append(token)
            if finish:
                running.discard(request)
                engine.release(request)
    return [tokens[request] for request in requests]


def generate(engine, ids, n, **changes):
    return run(engine, [submit(engine, ids, n, **changes)])[0]


def as_transformers(config, tensors):
    """The same weights in transformers' GPT2LMHeadModel, in eval mode."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
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
        )
    )
    state = {}
    for name, value in tensors.items():
        conv1d = ".attn." in name or ".mlp." in name
        transposed = value.T if conv1d and value.ndim == 2 else value
        key = name if name.startswith("lm_head") else f"transformer.{name}"
        state[key] = torch.tensor(np.array(transposed))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model.eval()


def canonical_of(model_file):
    """Canonical float32 tensors of a file, after the rounding of its dtype."""
    return {
        name: restore(model_file.config, model_file.dtype, name, model_file.tensors)
        for name in canonical_shapes(model_file.config)
    }


END = "<|endoftext|>"


def byte_tokenizer_spec():
    """One token per byte, and the end token as id 256."""
    from gptx.tokenizer import TokenizerSpec

    return TokenizerSpec(
        kind="bpe",
        tokens=(*(bytes([i]) for i in range(256)), None),
        pattern=r" ?\p{L}+|\s+|[^\s\p{L}]+",
        special_tokens={END: 256},
    )


def write_model(path, tensors=None, dtype="float32", **changes):
    """A random model with the byte tokenizer as a .gptx file; returns its config."""
    from gptx import modelfile

    config = make_config(**({"vocab_size": 257} | changes))
    modelfile.write(
        path,
        config,
        random_tensors(config) if tensors is None else tensors,
        dtype=dtype,
        tokenizer=byte_tokenizer_spec(),
        generation={"eos_token_id": 256},
    )
    return config
