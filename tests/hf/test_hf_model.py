"""The model as a function, and how it is found and loaded."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from hf_samples import PROMPTS

import gptx
from gptx import hf
from gptx.errors import ContextLengthError, GptxError, ParameterError, TokenIdError
from models import write_model


def test_logits_of_a_right_padded_batch_are_those_of_transformers(pair):
    import torch

    def script(lib):
        inputs = lib.padded(PROMPTS, "right")
        with torch.no_grad():
            return inputs["attention_mask"].bool(), lib.model(**inputs).logits

    (mask, ours), (_, theirs) = pair.run(script)
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-4, atol=1e-4)
    assert (ours[~mask] == 0).all()


def test_logits_of_a_left_padded_batch_are_those_of_transformers_with_positions(pair):
    import torch

    def script(lib):
        inputs = lib.padded(PROMPTS, "left")
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = lib.model(**inputs, position_ids=positions).logits
        return inputs["attention_mask"].bool(), logits

    (mask, ours), (_, theirs) = pair.run(script)
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_are_those_of_transformers(pair, side):
    import torch

    def script(lib):
        inputs = lib.padded(PROMPTS, side)
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            out = lib.model(**inputs, position_ids=positions, output_hidden_states=True)
        return mask.bool(), out.hidden_states

    (mask, ours), (_, theirs) = pair.run(script)
    assert len(ours) == len(theirs)
    for state, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(state[mask], expected[mask], rtol=1e-4, atol=1e-4)
        assert (state[~mask] == 0).all()


def test_a_tuple_holds_what_the_dictionary_does(pair):
    def script(lib):
        ids = lib.tokenizer("One day a prince", return_tensors="pt").input_ids
        named = lib.model(ids, labels=ids)
        plain = lib.model(ids, labels=ids, return_dict=False)
        return len(named), len(plain), plain[1].shape == named.logits.shape

    ours, theirs = pair.run(script)
    assert ours[1:] == theirs[1:] == (3, True)


def test_the_cache_is_an_entry_too(pair):
    def script(lib):
        ids = lib.tokenizer("One day a prince", return_tensors="pt").input_ids
        out = lib.model(ids)
        logits, past = lib.model(ids, return_dict=False)
        again = lib.model(ids[:, :1], past_key_values=past).logits
        same = type(out[1]) is type(out["past_key_values"]) is type(past)
        return (
            "past_key_values" in out,
            same,
            logits.shape,
            again.shape,
            lib.model(ids, labels=ids).loss.shape,
        )

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_the_loss_is_that_of_transformers(pair):
    import torch

    def script(lib):
        inputs = lib.padded(PROMPTS, "right")
        labels = inputs["input_ids"].clone()
        labels[inputs["attention_mask"] == 0] = -100
        with torch.no_grad():
            padded = lib.model(**inputs, labels=labels).loss
            ids = lib.tokenizer("One day a prince came by", return_tensors="pt").input_ids
            return float(padded), float(lib.model(ids, labels=ids).loss)

    ours, theirs = pair.run(script)
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_results_are_tuples_and_dictionaries_as_in_transformers(pair):
    def script(lib):
        ids = lib.tokenizer("One day", return_tensors="pt").input_ids
        out = lib.model(ids, labels=ids, use_cache=False)
        first = lib.model(ids, use_cache=False, return_dict=False)
        kept = lib.model(ids, use_cache=False, logits_to_keep=1).logits
        return list(out.keys()), len(out.to_tuple()), tuple(first[0].shape), tuple(kept.shape)

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_a_loop_of_its_own_over_past_key_values_gives_the_tokens_of_transformers(pair):
    def script(lib):
        ids = lib.tokenizer("Once upon a time", return_tensors="pt").input_ids
        out, tokens = lib.model(ids, use_cache=True), []
        for _ in range(10):
            token = out.logits[:, -1].argmax(-1)
            tokens.append(token.tolist())
            out = lib.model(token[:, None], past_key_values=out.past_key_values, use_cache=True)
        return tokens, out.past_key_values.get_seq_length()

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_numpy_comes_out_where_numpy_goes_in(folder):
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("Once upon", return_tensors="np")
    out = model(**inputs, labels=inputs.input_ids)
    assert isinstance(out.logits, np.ndarray)
    assert out.logits.dtype == np.float32
    assert out.loss.shape == ()
    assert isinstance(model.generate(**inputs), np.ndarray)
    assert model.generate(inputs.input_ids.tolist(), max_new_tokens=3).dtype == np.int64


def test_importing_gptx_does_not_import_hf():
    code = "import sys, gptx; assert 'gptx.hf' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_config_has_the_names_and_values_of_transformers(pair):
    def script(lib):
        config = lib.library.AutoConfig.from_pretrained(pair.folder)
        names = "vocab_size n_positions n_embd n_layer n_head n_inner activation_function"
        names += " hidden_size num_hidden_layers num_attention_heads max_position_embeddings"
        names += " layer_norm_epsilon tie_word_embeddings bos_token_id eos_token_id model_type"
        return [getattr(config, n) for n in names.split()], lib.model.config.n_layer

    ours, theirs = pair.run(script)
    assert ours == theirs
    assert hf.GPT2Config().n_embd == 768


def test_a_gptx_file_is_loaded_with_its_defaults(tmp_path):
    write_model(tmp_path / "m.gptx")
    model = hf.GPT2LMHeadModel.from_pretrained(tmp_path / "m.gptx", low_cpu_mem_usage=True)
    assert model.config.n_positions == 96
    assert model.generation_config.eos_token_id == 256
    assert hf.AutoConfig.from_pretrained(tmp_path / "m.gptx") == model.config
    ids = np.array([[97, 98]])
    expected = gptx.load(tmp_path / "m.gptx").generate([97, 98], temperature=0, max_new_tokens=9)
    new = model.generate(ids, max_new_tokens=9)[0, 2:].tolist()
    assert new[: expected.completion_tokens] == list(expected.token_ids)


def test_models_are_found_in_the_cache_of_the_hub(folder, tmp_path, monkeypatch):
    root = tmp_path / "hub" / "models--some--model"
    shutil.copytree(folder, root / "snapshots" / "abc")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert hf.AutoConfig.from_pretrained("some/model").n_layer == 2
    assert hf.AutoTokenizer.from_pretrained("some/model").vocab_size > 256
    assert hf.AutoModelForCausalLM.from_pretrained("some/model", revision="abc").dtype
    with pytest.raises(ParameterError, match="downloads nothing"):
        hf.AutoModelForCausalLM.from_pretrained("some/other")
    with pytest.raises(ParameterError, match="downloads nothing"):
        hf.AutoTokenizer.from_pretrained("gpt2")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int8-fast", np.float32])
def test_a_dtype_is_a_precision(folder, dtype):
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert model.gptx.precision == (dtype if isinstance(dtype, str) else "float32")
    assert model(np.array([[1, 2, 3]])).logits.shape[:2] == (1, 3)
    model.float()
    assert model.gptx.precision == "float32" or model.gptx.dtype != "float32"


def test_a_dtype_of_torch_is_understood(folder):
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16):
        model = hf.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=dtype)
        assert model.dtype == dtype
    with pytest.raises(ParameterError, match=r"dtype: .*float16"):
        hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)


WRONG_LOADS = [
    (dict(dtype="float64"), "dtype"),
    (dict(device_map="tpu"), "device_map"),
    (dict(load_in_8bit=True), "load_in_8bit"),
    (dict(quantization_config={}), "quantization_config"),
    (dict(force_download=True), "force_download"),
    (dict(config=hf.GPT2Config()), "config"),
]


@pytest.mark.parametrize(("arguments", "name"), WRONG_LOADS, ids=str)
def test_from_pretrained_refuses_by_name_what_it_does_not_honour(folder, arguments, name):
    with pytest.raises(GptxError, match=rf"^{name}\b"):
        hf.AutoModelForCausalLM.from_pretrained(folder, **arguments)


@pytest.fixture(scope="module")
def model(folder):
    return hf.AutoModelForCausalLM.from_pretrained(folder)


IDS = np.array([[5, 6, 7], [8, 9, 10]])
WRONG_CALLS = [
    (dict(input_ids=None), ParameterError, "input_ids"),
    (dict(input_ids=[5, 6]), ParameterError, "input_ids"),
    (dict(input_ids=[[5, 6], [7]]), ParameterError, "input_ids"),
    (dict(input_ids=[[5.5]]), ParameterError, "input_ids"),
    (dict(input_ids=[[5, 10_000]]), TokenIdError, "input_ids"),
    (dict(input_ids=[[1] * 97]), ContextLengthError, "prompt"),
    (dict(attention_mask=[[1, 1, 1]]), ParameterError, "attention_mask"),
    (dict(attention_mask=[[1, 0, 1], [1, 1, 1]]), ParameterError, "attention_mask"),
    (dict(attention_mask=[[0, 0, 0], [1, 1, 1]]), ParameterError, "input_ids"),
    (dict(position_ids=[[1, 2, 3]]), ParameterError, "position_ids"),
    (dict(labels=[[1, 2]]), ParameterError, "labels"),
    (dict(labels=IDS + 9999), ParameterError, "labels"),
    (dict(labels=IDS, attention_mask=[[1, 1, 0], [0, 1, 1]]), ParameterError, "labels"),
    (dict(inputs_embeds=IDS), GptxError, "inputs_embeds"),
    (dict(token_type_ids=IDS), GptxError, "token_type_ids"),
    (dict(output_attentions=True), GptxError, "output_attentions"),
    (dict(past_key_values=[1]), ParameterError, "past_key_values"),
    (dict(wrong=1), ParameterError, "wrong"),
]


@pytest.mark.parametrize(("arguments", "error", "name"), WRONG_CALLS, ids=str)
def test_a_call_names_the_argument_that_is_wrong(model, arguments, error, name):
    with pytest.raises(error, match=rf"^{name}\b"):
        model(**({"input_ids": IDS} | arguments))


def test_hidden_states_behind_a_cache_are_refused(model):
    past = model(input_ids=[[1, 2]]).past_key_values
    with pytest.raises(GptxError, match="^output_hidden_states"):
        model(input_ids=[[3]], past_key_values=past, output_hidden_states=True)


WRONG_GENERATIONS = [
    (dict(max_length=3), "max_length"),
    (dict(max_new_tokens=0), "max_new_tokens"),
    (dict(num_return_sequences=2), "num_return_sequences"),
    (dict(do_sample=True, temperature=0.0), "temperature"),
    (dict(do_sample=True, top_p=1.5), "top_p"),
    (dict(do_sample=True, top_k=-1), "top_k"),
    (dict(do_sample=True, num_beams=2), "do_sample"),
    (dict(do_sample=True, epsilon_cutoff=2), "epsilon_cutoff"),
    (dict(repetition_penalty=-1.0), "repetition_penalty"),
    (dict(bad_words_ids=[]), "bad_words_ids"),
    (dict(bad_words_ids=[[9999]]), "bad_words_ids"),
    (dict(bad_words_ids=[7]), "bad_words_ids"),
    (dict(sequence_bias={}), "sequence_bias"),
    (dict(sequence_bias={(9999,): 1.0}), "sequence_bias"),
    (dict(suppress_tokens=5), "suppress_tokens"),
    (dict(forced_eos_token_id=9999), "forced_eos_token_id"),
    (dict(forced_bos_token_id=-1), "forced_bos_token_id"),
    (dict(stop_strings=[""]), "stop_strings"),
    (dict(guidance_scale=1.5), "guidance_scale"),
    (dict(watermarking_config={}), "watermarking_config"),
    (dict(dola_layers="low"), "dola_layers"),
    (dict(force_words_ids=[[1]]), "force_words_ids"),
    (dict(constraints=[1]), "constraints"),
    (dict(token_healing=True), "token_healing"),
    (dict(top_h=0.4), "top_h"),
    (dict(encoder_repetition_penalty=1.5), "encoder_repetition_penalty"),
    (dict(encoder_no_repeat_ngram_size=2), "encoder_no_repeat_ngram_size"),
    (dict(remove_invalid_values=True), "remove_invalid_values"),
    (dict(output_attentions=True), "output_attentions"),
    (dict(output_hidden_states=True), "output_hidden_states"),
    (dict(inputs_embeds=IDS), "inputs_embeds"),
    (dict(custom_generate="x"), "custom_generate"),
    (dict(negative_prompt_ids=IDS), "negative_prompt_ids"),
    (dict(logits_processor=5), "logits_processor"),
    (dict(logits_processor=[lambda ids, scores: None]), "logits_processor"),
    (dict(logits_processor=[lambda ids, scores: scores[:, :3]]), "logits_processor"),
    (dict(stopping_criteria=5), "stopping_criteria"),
    (dict(prefix_allowed_tokens_fn=lambda i, ids: []), "prefix_allowed_tokens_fn"),
    (dict(assistant_model=5), "assistant_model"),
    (dict(generation_config={}), "generation_config"),
    (dict(seed=-1), "seed"),
    (dict(max_new_token=5), "max_new_token"),
    (dict(num_beams=2, num_return_sequences=3), "num_return_sequences"),
    (dict(num_beams=2, prompt_lookup_num_tokens=3), "prompt_lookup_num_tokens"),
    (dict(num_beams=2, stopping_criteria=[print]), "stopping_criteria"),
    (dict(num_beams=3, num_beam_groups=2), "num_beam_groups"),
    (dict(num_beams=2, early_stopping="now"), "early_stopping"),
    (dict(penalty_alpha=0.5, output_scores=True, return_dict_in_generate=True), "output_scores"),
]


@pytest.mark.parametrize(("arguments", "name"), WRONG_GENERATIONS, ids=lambda v: str(v)[:60])
def test_generate_names_the_argument_that_is_wrong_and_the_model_goes_on(model, arguments, name):
    free = model.gptx._engine.free_blocks
    with pytest.raises(GptxError, match=rf"^{name}\b"):
        model.generate(**({"input_ids": IDS} | arguments))
    assert model.gptx._engine.free_blocks == free
    assert model.generate(IDS, max_new_tokens=2).shape == (2, 5)


def test_an_unknown_argument_of_a_generation_config_is_refused():
    with pytest.raises(ParameterError, match="max_new_token:"):
        hf.GenerationConfig(max_new_token=5)


@pytest.mark.parametrize("call", [lambda m: m.train(), lambda m: m.half()])
def test_what_a_model_does_not_do_is_refused(model, call):
    with pytest.raises(GptxError):
        call(model)
    assert model.eval().to("cpu").cpu().gptx.device == "cpu"
    with pytest.raises(ParameterError, match="new_num_tokens"):
        model.resize_token_embeddings(10_000)
