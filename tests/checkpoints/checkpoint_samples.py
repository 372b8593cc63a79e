"""Random checkpoints in the formats of the world, made of canonical tensors or by transformers."""

from __future__ import annotations

import json
import pickle

import numpy as np
import torch
from safetensors.torch import save_file

from models import make_config, random_tensors

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
SMALL = dict(vocab_size=71, block_size=24, n_layer=2, n_head=2, n_embd=12)


def small(**changes):
    """A small config and its canonical tensors."""
    config = make_config(**{**SMALL, **changes})
    return config, random_tensors(config)


def named(tensors, *, conv1d=False, prefix="", dtype=torch.float32, head=None, bias=True):
    """A state_dict of canonical tensors. ``head``: None, "tied" (the same tensor) or "equal"."""
    result = {}
    for name, array in tensors.items():
        if not bias and name.endswith(".bias"):
            continue
        array = array.T.copy() if conv1d and name.endswith(CONV1D) else array
        full = name if name == "lm_head.weight" else prefix + name
        result[full] = torch.from_numpy(array).to(dtype)
    if head:
        wte = result[prefix + "wte.weight"]
        result["lm_head.weight"] = wte if head == "tied" else wte.clone()
    return result


def hf_config(config, **changes):
    """``config.json`` as transformers writes it, as far as it matters."""
    names = {"activation": "activation_function", "block_size": "n_positions"}
    values = {names.get(key, key): value for key, value in config.to_dict().items()}
    values |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]} | changes
    return {key: value for key, value in values.items() if value is not ...}


def hf_folder(path, config, state_dict, weights="model.safetensors", **changes):
    """A Hugging Face folder of one file of weights."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(hf_config(config, **changes)))
    if weights.endswith(".safetensors"):
        state_dict = {name: tensor.contiguous() for name, tensor in state_dict.items()}
        save_file(state_dict, path / weights, metadata={"format": "pt"})
    else:
        torch.save(state_dict, path / weights)
    return path


def shard(path, state_dict, stem, suffix, count=3):
    """Splits a state_dict into shards and their index."""
    weight_map = {}
    for i in range(count):
        part = dict(list(state_dict.items())[i::count])
        name = f"{stem}-{i + 1:05}-of-{count:05}.{suffix}"
        if suffix == "safetensors":
            save_file({k: v.contiguous() for k, v in part.items()}, path / name)
        else:
            torch.save(part, path / name)
        weight_map |= dict.fromkeys(part, name)
    index = path / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def nanogpt(path, config, tensors, *, wrapper="", bias=True, model_args=None, train_config=None):
    """nanoGPT's ckpt.pt, with optimizer state as train.py leaves it."""
    model = named(tensors, prefix="transformer.", head="tied", bias=bias)
    args = {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "block_size": config.block_size,
        "bias": bias,
        "vocab_size": config.vocab_size,
        "dropout": 0.0,
    }
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], betas=(0.9, 0.95))
    parameter.sum().backward()
    optimizer.step()
    checkpoint = {
        "model": {wrapper + name: tensor for name, tensor in model.items()},
        "optimizer": optimizer.state_dict(),
        "model_args": args | (model_args or {}),
        "iter_num": 5000,
        "best_val_loss": torch.tensor(1.4697),
        "config": {"dataset": "tiny", "out_dir": "out", "compile": True} | (train_config or {}),
    }
    torch.save(checkpoint, path)
    return path


def meta_pickle(path, characters):
    """nanoGPT's meta.pkl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stoi = {character: i for i, character in enumerate(characters)}
    meta = {"vocab_size": len(stoi), "itos": {i: c for c, i in stoi.items()}, "stoi": stoi}
    path.write_bytes(pickle.dumps(meta))
    return path


def mask_buffers(n_layer, block_size, prefix="", dtype=torch.uint8):
    """The buffers that transformers before 4.31 kept in its files."""
    mask = torch.tril(torch.ones(block_size, block_size)).to(dtype)
    buffers = {}
    for i in range(n_layer):
        buffers[f"{prefix}h.{i}.attn.bias"] = mask.view(1, 1, block_size, block_size).clone()
        buffers[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return buffers


def assert_canonical(found, expected):
    """The same names in the same order, the same bits, and float32."""
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        assert found[name].flags.c_contiguous
        np.testing.assert_array_equal(found[name], array, err_msg=name)
