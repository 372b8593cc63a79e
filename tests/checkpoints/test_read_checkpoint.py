"""Every format gives the tensors it was made of, and names what does not belong."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoint_samples import (
    assert_canonical,
    hf_folder,
    mask_buffers,
    meta_pickle,
    named,
    nanogpt,
    shard,
    small,
)
from safetensors.torch import save_file

from gptx.checkpoints import canonical_names, read_checkpoint
from gptx.errors import ConvertError, ModelFileError, ParameterError, UnsafeCheckpointError

transformers = pytest.importorskip("transformers")


def read(path, **options):
    return read_checkpoint(path, **options)


# -- Hugging Face folders


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("head", [None, "equal"])
def test_a_hugging_face_folder_reads(tmp_path, prefix, weights, head):
    config, tensors = small()
    state_dict = named(tensors, conv1d=True, prefix=prefix, head=head)
    found = read(hf_folder(tmp_path, config, state_dict, weights))
    assert found.config == config
    assert_canonical(found.tensors, tensors)
    assert found.source.startswith(f"Hugging Face GPT-2, {weights}, ")
    assert found.notes == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_other_float_types_read_as_float32(tmp_path, dtype, weights):
    config, tensors = small()
    rounded = {k: torch.from_numpy(v).to(dtype).float().numpy() for k, v in tensors.items()}
    state_dict = named(tensors, conv1d=True, dtype=dtype)
    found = read(hf_folder(tmp_path, config, state_dict, weights))
    assert_canonical(found.tensors, rounded)
    assert str(dtype).removeprefix("torch.") in found.source


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_sharded_folder_reads(tmp_path, suffix):
    config, tensors = small()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    hf_folder(tmp_path, config, {}, "unused.bin")
    (tmp_path / "unused.bin").unlink()
    index = shard(tmp_path, named(tensors, conv1d=True), stem, suffix)
    assert_canonical(read(tmp_path).tensors, tensors)
    assert_canonical(read(index).tensors, tensors)


def test_what_transformers_saves_reads_back(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=20, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="3KB")
    model.transformer.save_pretrained(tmp_path / "base")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    for folder in ("whole", "sharded", "base"):
        found = read(tmp_path / folder)
        assert found.generation == {"bos_token_id": 0, "eos_token_id": 0}
        source = model.transformer.state_dict()
        assert sorted(found.tensors) == sorted(source)
        for name, tensor in source.items():
            square = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            expected = tensor.T if square else tensor
            np.testing.assert_array_equal(found.tensors[name], expected.numpy())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_function": "gelu"},
        {"activation_function": "relu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"n_inner": 20},
        {"layer_norm_epsilon": 1e-3},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_a_config_means_in_gptx_what_it_means_in_transformers(tmp_path, changes):
    from gptx.training.model import GPT

    config = transformers.GPT2Config(
        vocab_size=61, n_positions=20, n_embd=8, n_layer=3, n_head=2,
        bos_token_id=0, eos_token_id=0, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path)
    found = read(tmp_path)
    ours = GPT(found.config).eval()
    ours.load_canonical(dict(found.tensors))
    ids = torch.arange(20)[None] * 7 % 61
    with torch.no_grad():
        expected = model(ids).logits
        logits = ours(ids)[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_untied_heads_are_kept_apart(tmp_path):
    config, tensors = small(tie_word_embeddings=False)
    folder = hf_folder(tmp_path, config, named(tensors, conv1d=True))
    found = read(folder)
    assert not found.config.tie_word_embeddings
    assert_canonical(found.tensors, tensors)
    hf_folder(tmp_path, config, named(tensors, conv1d=True), tie_word_embeddings=True)
    assert "lm_head differs from wte" in read(folder).notes[0]
    headless = named(tensors, conv1d=True)
    del headless["lm_head.weight"]
    hf_folder(tmp_path, config, headless)
    with pytest.raises(ConvertError, match=r"tensor lm_head\.weight: missing"):
        read(folder)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32])
def test_mask_buffers_are_dropped(tmp_path, dtype):
    config, tensors = small()
    state_dict = named(tensors, conv1d=True) | mask_buffers(2, 24, dtype=dtype)
    for weights in ("model.safetensors", "pytorch_model.bin"):
        folder = hf_folder(tmp_path / weights, config, state_dict, weights)
        assert_canonical(read(folder).tensors, tensors)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 1, 24, 24),
        torch.tril(torch.ones(24, 24)).view(24, 24),
        torch.tril(torch.ones(24, 24), 1).view(1, 1, 24, 24),
        torch.tril(torch.ones(24, 25)).view(1, 1, 24, 25),
        torch.zeros(36),
    ],
    ids=["full", "2d", "one ahead", "not square", "a vector"],
)
def test_a_mask_that_is_not_causal_is_refused(tmp_path, mask):
    config, tensors = small()
    state_dict = named(tensors, conv1d=True) | {"h.0.attn.bias": mask}
    with pytest.raises(ConvertError, match=r"tensor h\.0\.attn\.bias: expected a causal mask"):
        read(hf_folder(tmp_path, config, state_dict))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type: expected 'gpt2', got 'llama'"),
        ({"activation_function": "silu"}, "activation_function: expected one of .*got 'silu'"),
        ({"activation_function": 3}, "activation_function"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"n_head": 5}, "n_head: expected a divisor of n_embd = 12, got 5"),
        ({"n_head": "2"}, "n_head: expected an integer"),
        ({"n_embd": 16}, r"n_embd: expected 12, as in tensor wte\.weight, got 16"),
        ({"vocab_size": 72}, r"vocab_size: expected 71, as in tensor wte\.weight, got 72"),
        ({"n_positions": 25}, r"n_positions: expected 24, as in tensor wpe\.weight, got 25"),
        ({"n_inner": 47}, r"n_inner: expected 48, as in tensor h\.0\.mlp\.c_fc\.weight, got 47"),
        ({"n_layer": 3}, r"tensor h\.2\.ln_1\.weight: missing \(the model has 3 layers\)"),
        ({"n_layer": 2**40}, r"tensor h\.2\.ln_1\.weight: missing"),
        ({"n_layer": 1}, r"tensor h\.1\..*: not in a model of 1 layers"),
        ({"n_layer": 2.0}, "n_layer"),
        ({"layer_norm_epsilon": -1.0}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon"),
        ({"scale_attn_weights": 1}, "scale_attn_weights: expected true or false"),
        ({"reorder_and_upcast_attn": "no"}, "reorder_and_upcast_attn"),
        ({"hidden_size": 13}, "hidden_size and n_embd differ"),
    ],
    ids=str,
)
def test_a_config_field_is_honoured_or_refused_by_name(tmp_path, changes, message):
    config, tensors = small()
    folder = hf_folder(tmp_path, config, named(tensors, conv1d=True), **changes)
    with pytest.raises(ConvertError, match=message):
        read(folder)


def test_fields_that_are_absent_have_the_defaults_of_transformers(tmp_path):
    config, tensors = small(n_head=12, n_embd=24)
    absent = dict.fromkeys(
        ("model_type", "n_head", "vocab_size", "n_positions", "n_layer", "n_inner", "n_embd",
         "activation_function", "layer_norm_epsilon", "scale_attn_weights",
         "scale_attn_by_inverse_layer_idx", "tie_word_embeddings"), ...
    )  # fmt: skip
    found = read(hf_folder(tmp_path, config, named(tensors, conv1d=True), **absent))
    assert found.config == config


def test_an_n_inner_of_null_is_four_times_the_width(tmp_path):
    config, tensors = small()
    state_dict = named(tensors, conv1d=True)
    assert read(hf_folder(tmp_path, config, state_dict, n_inner=None)).config.n_inner == 48
    config, tensors = small(n_inner=20)
    with pytest.raises(ConvertError, match="n_inner: expected 20"):
        read(hf_folder(tmp_path, config, named(tensors, conv1d=True), n_inner=None))


def test_linear_matrices_in_a_hugging_face_folder_are_refused(tmp_path):
    config, tensors = small()
    with pytest.raises(ConvertError, match=r"c_attn\.weight: expected shape \[12, 36\]"):
        read(hf_folder(tmp_path, config, named(tensors)))


def drop(name):
    return lambda state_dict: state_dict.pop(name)


def add(name, *shape):
    return lambda state_dict: state_dict.update({name: torch.ones(*shape)})


FOREIGN = {
    "missing weight": (drop("h.1.mlp.c_proj.weight"), r"h\.1\.mlp\.c_proj\.weight: missing \(1 of"),
    "missing bias": (drop("h.0.attn.c_attn.bias"), r"h\.0\.attn\.c_attn\.bias: missing"),
    "missing embedding": (drop("wte.weight"), r"wte\.weight: missing"),
    "missing positions": (drop("wpe.weight"), r"wpe\.weight: missing"),
    "missing last norm": (drop("ln_f.bias"), r"ln_f\.bias: missing"),
    "another layer": (add("h.2.ln_1.weight", 12), r"h\.2\.ln_1\.weight: not in a model of 2"),
    "a layer with a leading zero": (add("h.01.ln_1.weight", 12), r"'h\.01\.ln_1\.weight': not"),
    "gated MLP": (add("h.0.mlp.gate_proj.weight", 12, 12), r"gate_proj\.weight': .*gated MLP"),
    "rotary": (add("h.0.attn.rotary_emb.inv_freq", 3), r"inv_freq': .*rotary"),
    "cross-attention": (add("h.0.crossattention.c_attn.weight", 12, 24), r"cross-attention"),
    "another head": (add("classifier.weight", 2, 12), r"'classifier\.weight': .*classification"),
    "class head": (add("score.weight", 2, 11), r"score\.weight: expected shape \[2, 12\]"),
    "head with bias": (add("lm_head.bias", 71), r"'lm_head\.bias': not part of a GPT-2"),
    "adapter": (add("h.0.attn.c_attn.lora_A.weight", 2, 12), r"LoRA"),
    "llama": (add("model.layers.0.self_attn.q_proj.weight", 2, 2), r"q_proj\.weight': not part"),
    "control characters": (add("a\x1b[2J", 2), r"'a\\x1b\[2J': not part of a GPT-2"),
    "twice": (add("transformer.ln_f.bias", 12), r"expected one ln_f\.bias, got two"),
    "c_attn": (add("h.0.attn.c_attn.weight", 12, 24), r"c_attn\.weight: expected shape \[36, 12\]"),
    "c_proj": (add("h.1.attn.c_proj.weight", 12, 11), r"c_proj\.weight: expected shape \[12, 12\]"),
    "c_fc": (add("h.1.mlp.c_fc.weight", 12, 44), r"h\.1\.mlp\.c_fc\.weight: expected shape"),
    "ln": (add("h.0.ln_2.weight", 13), r"ln_2\.weight: expected shape \[12\], got \[13\]"),
    "wpe": (add("wpe.weight", 24, 13), r"wpe\.weight: expected shape \[24, 12\], got \[24, 13\]"),
    "head": (add("lm_head.weight", 70, 12), r"lm_head\.weight: expected shape \[71, 12\]"),
    "vector for a matrix": (add("wte.weight", 71), r"wte\.weight: expected a matrix"),
    "empty": (add("wte.weight", 0, 12), r"wte\.weight: expected a matrix that is not empty"),
}


@pytest.mark.parametrize("case", FOREIGN, ids=lambda case: case.replace(" ", "-"))
@pytest.mark.parametrize("where", ["folder", "file"])
def test_tensors_that_do_not_make_a_gpt2_are_refused_by_name(tmp_path, case, where):
    change, message = FOREIGN[case]
    config, tensors = small()
    state_dict = named(tensors, conv1d=True)
    change(state_dict)
    path = hf_folder(tmp_path, config, state_dict, "pytorch_model.bin")
    if where == "file":
        path = path / "pytorch_model.bin"
    with pytest.raises(ConvertError, match=message) as caught:
        read(path)
    assert caught.value.tensor is not None


def test_a_norm_without_bias_beside_linears_with_bias_is_refused(tmp_path):
    """RMSNorm under GPT-2's names."""
    config, tensors = small()
    state_dict = named(tensors, conv1d=True)
    for name in list(state_dict):
        if "ln_" in name and name.endswith("bias"):
            del state_dict[name]
    with pytest.raises(ConvertError, match=r"h\.0\.ln_1\.bias: missing \(5 of 28"):
        read(hf_folder(tmp_path, config, state_dict))


def test_a_weight_that_is_not_finite_is_named_when_it_is_read(tmp_path):
    config, tensors = small()
    tensors["h.1.mlp.c_fc.weight"][3, 5] = np.nan
    found = read(hf_folder(tmp_path, config, named(tensors, conv1d=True)))
    with pytest.raises(ConvertError, match=r"h\.1\.mlp\.c_fc\.weight: .* nan at index \[5, 3\]"):
        found.tensors["h.1.mlp.c_fc.weight"]


# -- shards


def test_an_index_and_its_shards_must_agree(tmp_path):
    config, tensors = small()
    state_dict = named(tensors, conv1d=True)
    hf_folder(tmp_path, config, {}, "unused.bin")
    (tmp_path / "unused.bin").unlink()
    index = shard(tmp_path, state_dict, "model", "safetensors")
    good = json.loads(index.read_text())

    def check(message, **changes):
        weight_map = good["weight_map"] | changes
        weight_map = {name: value for name, value in weight_map.items() if value is not ...}
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ConvertError, match=message):
            read(tmp_path)

    first, second = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    check(r"tensor 'wpe\.weight': .* does not say so", **{"wpe.weight": second})
    check(r"tensor 'wpe\.weight': .* does not say so", **{"wpe.weight": ...})
    check(r"tensor 'extra': not in its shard", extra=first)
    check("missing; model.safetensors.index.json names 4 shards", extra="more.safetensors")
    for name in ("../x.safetensors", "/etc/passwd", "a/b.bin", "..", ".x.bin", "x.txt", 3, ""):
        check("expected the plain name of a shard", extra=name)
    index.write_text("{}")
    with pytest.raises(ConvertError, match="weight_map"):
        read(tmp_path)
    index.write_text('{"weight_map": {"a": 1, "a": 2}}')
    with pytest.raises(ConvertError, match="key 'a' appears twice"):
        read(tmp_path)


def test_a_shard_may_be_a_link_as_in_the_cache_of_the_hub(tmp_path):
    config, tensors = small()
    folder = hf_folder(tmp_path / "snapshot", config, named(tensors, conv1d=True))
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to("../blob")
    assert_canonical(read(folder).tensors, tensors)


# -- nanoGPT and bare state_dicts


@pytest.mark.parametrize("wrapper", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_a_nanogpt_checkpoint_reads(tmp_path, wrapper):
    config, tensors = small(activation="gelu")
    found = read(nanogpt(tmp_path / "ckpt.pt", config, tensors, wrapper=wrapper))
    assert found.config == config
    assert_canonical(found.tensors, tensors)
    assert found.source.startswith("nanoGPT, ckpt.pt, iteration 5000, val loss 1.47, ")
    assert "gelu" in found.notes[0]


def test_a_nanogpt_checkpoint_without_biases_reads_as_zeros(tmp_path):
    config, tensors = small(activation="gelu")
    found = read(nanogpt(tmp_path / "ckpt.pt", config, tensors, bias=False))
    zeros = {k: np.zeros_like(v) if k.endswith(".bias") else v for k, v in tensors.items()}
    assert_canonical(found.tensors, zeros)
    assert "no biases: zeros" in found.notes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"n_head": 5}, "n_head"),
        ({"n_head": None}, "model_args n_head: expected an integer"),
        ({"n_layer": 3}, "model_args n_layer: expected 2 as in the tensors, got 3"),
        ({"vocab_size": 50}, "model_args vocab_size"),
        ({"bias": False}, "bias=False, but the checkpoint has biases"),
        ({"block_size": "24"}, "model_args block_size"),
    ],
)
def test_model_args_that_contradict_the_tensors_are_refused(tmp_path, args, message):
    path = nanogpt(tmp_path / "ckpt.pt", *small(), model_args=args)
    with pytest.raises(ConvertError, match=message):
        read(path)


CHARACTERS = sorted("\n !,.床前明月光abcdefghijklmnopqrstuvwxyz")


@pytest.mark.parametrize("place", ["meta.pkl", "data/tiny/meta.pkl", "../data/tiny/meta.pkl"])
def test_the_characters_of_a_nanogpt_model_are_found(tmp_path, place):
    config, tensors = small(vocab_size=len(CHARACTERS))
    out = tmp_path / "out"
    out.mkdir()
    path = nanogpt(out / "ckpt.pt", config, tensors)
    meta_pickle(out / place, CHARACTERS)
    found = read(path)
    assert found.tokenizer.kind == "chars"
    assert [t.decode() for t in found.tokenizer.tokens] == CHARACTERS
    assert found.notes[-1] == f"tokenizer of {len(CHARACTERS)} characters from meta.pkl"


def test_a_dataset_name_cannot_leave_its_folder(tmp_path):
    (tmp_path / "a").mkdir()
    meta_pickle(tmp_path / "secret" / "meta.pkl", CHARACTERS)
    config = {"dataset": "../../secret"}
    path = nanogpt(tmp_path / "a" / "ckpt.pt", *small(), train_config=config)
    assert read(path).tokenizer is None


def test_a_hostile_meta_pickle_is_refused(tmp_path):
    path = nanogpt(tmp_path / "ckpt.pt", *small())
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R.")
    with pytest.raises(UnsafeCheckpointError, match="posix system"):
        read(path)
    assert read(path, tokenizer="none").tokenizer is None


@pytest.mark.parametrize("stoi", [{}, {"ab": 0}, {"a": "0"}, {"a": 1}, {"a": 0, "b": 0}, [1]])
def test_a_meta_pickle_without_a_table_of_characters_is_refused(tmp_path, stoi):
    import pickle

    path = nanogpt(tmp_path / "ckpt.pt", *small())
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": stoi}))
    with pytest.raises(ConvertError, match=r"meta\.pkl: stoi"):
        read(path)


def test_the_padding_of_a_vocabulary_is_trimmed(tmp_path):
    config, tensors = small(vocab_size=50_304, n_embd=4, n_layer=1)
    found = read(nanogpt(tmp_path / "ckpt.pt", config, tensors))
    assert found.config.vocab_size == 50_257
    assert "vocabulary trimmed from 50304 to 50257" in found.notes
    assert found.tensors["wte.weight"].shape == (50_257, 4)
    np.testing.assert_array_equal(found.tensors["wte.weight"], tensors["wte.weight"][:50_257])
    meta_pickle(tmp_path / "meta.pkl", CHARACTERS)
    with pytest.raises(ConvertError, match="tokenizer: expected about 50304 tokens, got"):
        read(tmp_path / "ckpt.pt")


def test_the_vocabulary_is_trimmed_to_the_tokenizer(tmp_path):
    _, tensors = small(vocab_size=64, tie_word_embeddings=False)
    path = tmp_path / "weights.pt"
    torch.save(named(tensors, prefix="transformer."), path)
    meta_pickle(tmp_path / "meta.pkl", CHARACTERS)
    found = read(path, n_head=2)
    assert found.config.vocab_size == len(CHARACTERS)
    for name in ("wte.weight", "lm_head.weight"):
        np.testing.assert_array_equal(found.tensors[name], tensors[name][: len(CHARACTERS)])
    assert {n: a.shape for n, a in found.tensors.items()} == canonical_names(found.config)


@pytest.mark.parametrize("conv1d", [True, False])
@pytest.mark.parametrize("prefix", ["", "transformer.", "_orig_mod.transformer."])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_bare_state_dict_reads(tmp_path, conv1d, prefix, suffix):
    config, tensors = small()
    state_dict = named(tensors, conv1d=conv1d, prefix=prefix)
    path = tmp_path / "model.bin"  # neither suffix: the content says what it is
    if suffix == "pt":
        torch.save(state_dict, path)
    else:
        save_file(state_dict, path)
    found = read(path, n_head=2)
    assert found.config == config
    assert_canonical(found.tensors, tensors)
    assert ("Conv1D" if conv1d else "Linear") in found.source
    assert any(note.startswith("activation gelu_new assumed") for note in found.notes)


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_a_state_dict_inside_of_a_dict_reads(tmp_path, key):
    _, tensors = small()
    torch.save({key: named(tensors), "epoch": 3, "args": {"lr": 0.1}}, tmp_path / "x.pt")
    assert_canonical(read(tmp_path / "x.pt", n_head=2).tensors, tensors)


def test_heads_are_asked_for_where_nothing_says_them(tmp_path):
    _, tensors = small()
    torch.save(named(tensors), tmp_path / "x.pt")
    with pytest.raises(ConvertError, match=r"number of heads .*--n-head"):
        read(tmp_path / "x.pt")
    _, tensors = small(n_embd=128, n_layer=1)
    torch.save(named(tensors), tmp_path / "x.pt")
    found = read(tmp_path / "x.pt")
    assert found.config.n_head == 2
    assert "n_head 2, for the usual head size of 64; else: --n-head" in found.notes
    with pytest.raises(ParameterError, match="n_head: expected a divisor of n_embd = 128, got 5"):
        read(tmp_path / "x.pt", n_head=5)


def test_a_config_beside_a_bare_state_dict_is_used(tmp_path):
    config, tensors = small(activation="relu", n_head=3)
    hf_folder(tmp_path, config, {}, "unused.bin")
    torch.save(named(tensors), tmp_path / "x.pt")
    found = read(tmp_path / "x.pt")
    assert found.config == config
    assert "hyperparameters from config.json" in found.notes
    with pytest.raises(ConvertError, match="n_head: the checkpoint says 3, not 2"):
        read(tmp_path / "x.pt", n_head=2)


def test_the_first_mingpt_reads(tmp_path):
    config, tensors = small(activation="gelu", tie_word_embeddings=False)
    renamed = {
        "tok_emb.weight": tensors["wte.weight"],
        "pos_emb": tensors["wpe.weight"][None],
        "ln_f.weight": tensors["ln_f.weight"],
        "ln_f.bias": tensors["ln_f.bias"],
        "head.weight": tensors["lm_head.weight"],
    }
    for i in range(2):
        for kind in ("weight", "bias"):
            fused = tensors[f"h.{i}.attn.c_attn.{kind}"]
            for j, part in enumerate(("query", "key", "value")):
                renamed[f"blocks.{i}.attn.{part}.{kind}"] = fused[12 * j : 12 * j + 12]
            for old, new in (
                ("ln1", "ln_1"), ("ln2", "ln_2"), ("attn.proj", "attn.c_proj"),
                ("mlp.0", "mlp.c_fc"), ("mlp.2", "mlp.c_proj"),
            ):  # fmt: skip
                renamed[f"blocks.{i}.{old}.{kind}"] = tensors[f"h.{i}.{new}.{kind}"]
        renamed[f"blocks.{i}.attn.mask"] = np.tril(np.ones((1, 1, 24, 24), np.float32))
    state_dict = {name: torch.from_numpy(array.copy()) for name, array in renamed.items()}
    torch.save(state_dict, tmp_path / "x.pt")
    found = read(tmp_path / "x.pt", n_head=2)
    assert found.config == config
    assert_canonical(found.tensors, tensors)
    del state_dict["blocks.1.attn.key.bias"]
    torch.save(state_dict, tmp_path / "x.pt")
    with pytest.raises(ConvertError, match=r"blocks\.1\.attn\.key\.bias: missing"):
        read(tmp_path / "x.pt", n_head=2)


# -- what else a path may be


def test_an_activation_may_be_asked_for(tmp_path):
    path = nanogpt(tmp_path / "ckpt.pt", *small())
    found = read(path, activation="gelu_new")
    assert found.config.activation == "gelu_new"
    assert [n for n in found.notes if "activation" in n] == ["activation gelu_new, as asked"]
    with pytest.raises(ParameterError, match="activation: expected one of gelu_new, gelu, relu"):
        read(path, activation="swish")
    with pytest.raises(ParameterError, match="n_head"):
        read(path, n_head=0)


def test_a_module_is_refused_with_the_line_that_saves_its_weights(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(UnsafeCheckpointError, match=r"Linear.*torch\.save\(model\.state_dict\(\)"):
        read(tmp_path / "model.pt")


def test_a_file_of_old_torch_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "old.pt"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ConvertError, match=r"torch before 1\.6.*torch\.save\(torch\.load"):
        read(path)


OTHER_FILES = {
    b"": "the file is empty",
    b"GGUF\3\0\0\0": "a GGUF file",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"version https://git-lfs.github.com/spec/v1\n": "a Git LFS pointer.*git lfs pull",
    b"<html><body>404</body></html>": "a web page",
    b"hello": "expected a safetensors file or one written by torch.save",
    b"\x80\x02}.": "a pickle without tensors",
}


@pytest.mark.parametrize("content", OTHER_FILES, ids=lambda c: repr(c[:4]))
def test_a_file_that_is_no_checkpoint_says_what_it_is(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ConvertError, match=OTHER_FILES[content]):
        read(tmp_path / "x.pt")


def test_a_gptx_file_is_no_checkpoint(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.gptx", metadata={"format": "gptx"})
    with pytest.raises(ConvertError, match=r"already a \.gptx file; load it with gptx\.load"):
        read(tmp_path / "x.gptx")


@pytest.mark.parametrize("value", [[1, 2], {}, {"a": 1}, {"model": {"x": [1]}}, torch.ones(2)])
def test_a_torch_file_without_a_state_dict_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(ConvertError, match=r"x\.pt: .*expected a "):
        read(tmp_path / "x.pt")


def test_a_file_name_that_is_no_text_does_not_reach_the_model_file(tmp_path):
    path = tmp_path / os.fsdecode(b"a\xff\x1b.pt")
    _, tensors = small()
    torch.save(named(tensors), tmp_path / "x.pt")
    (tmp_path / "x.pt").rename(path)
    assert read(path, n_head=2).source.startswith("state_dict (Linear), a??.pt, ")


def test_a_folder_needs_one_checkpoint(tmp_path):
    with pytest.raises(ConvertError, match="expected config.json with one of model.safetensors"):
        read(tmp_path)
    config, tensors = small()
    nanogpt(tmp_path / "ckpt.pt", config, tensors)
    assert_canonical(read(tmp_path).tensors, tensors)
    torch.save({}, tmp_path / "other.pt")
    with pytest.raises(ConvertError, match="expected one checkpoint, got ckpt.pt, other.pt"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing.pt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_fifo_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(ConvertError, match="expected a regular file"):
        read(tmp_path / "x.pt")


def test_generation_defaults_are_taken_where_they_make_sense(tmp_path):
    config, tensors = small()
    folder = hf_folder(
        tmp_path, config, named(tensors, conv1d=True), eos_token_id=50256, bos_token_id=3
    )
    found = read(folder)
    assert found.generation == {"bos_token_id": 3}
    assert "eos_token_id 50256 left out: not below 71" in found.notes
    values = {"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.7, "top_p": 7, "top_k": 9}
    (folder / "generation_config.json").write_text(json.dumps(values))
    found = read(folder)
    assert found.generation == {
        "bos_token_id": 3, "eos_token_id": [1, 2], "temperature": 0.7, "top_k": 9
    }  # fmt: skip
    assert "top_p 7 left out: outside of its range" in found.notes
    (folder / "generation_config.json").write_text('{"temperature": 0.7}')
    assert "temperature" not in read(folder).generation


def test_the_licence_of_a_model_card_is_kept(tmp_path):
    config, tensors = small()
    folder = hf_folder(tmp_path, config, named(tensors, conv1d=True))
    assert read(folder).license == ""
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# Model\nlicense: x\n")
    assert read(folder).license == "mit"


@pytest.mark.parametrize("kind", ["hf", "nanogpt", "safetensors"])
def test_a_truncated_checkpoint_is_a_typed_error_at_every_length(tmp_path, kind):
    config, tensors = small(n_layer=1)
    folder = hf_folder(tmp_path, config, named(tensors, conv1d=True), "model.safetensors")
    path = folder / "model.safetensors"
    if kind != "safetensors":
        path = nanogpt(tmp_path / "ckpt.pt", config, tensors)
    if kind == "hf":
        path = hf_folder(folder, config, named(tensors, conv1d=True), "x.bin") / "x.bin"
    data = path.read_bytes()
    for i in range(50):
        path.write_bytes(data[: len(data) * i // 50])
        with pytest.raises((ModelFileError, ConvertError)):
            read(path)


PEAK = """
import resource, sys
from gptx.checkpoints import read_checkpoint
found = read_checkpoint(sys.argv[1], n_head=2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = sum(array.nbytes for array in found.tensors.values())
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert "torch" not in sys.modules
print(total, (after - before) * 1024)
"""


def test_tensors_are_read_one_at_a_time(tmp_path):
    _, tensors = small(n_layer=12, n_embd=256, vocab_size=3000)
    torch.save(named(tensors, conv1d=True, head="tied"), tmp_path / "x.pt")
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "x.pt")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    total, grown = map(int, result.stdout.split())
    largest = max(array.nbytes for array in tensors.values())
    assert total > 10 * largest
    assert grown < 4 * largest + 4_000_000
