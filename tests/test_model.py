"""The public API: text in, text out, every refusal named, and the model usable after each."""

import subprocess
import sys
import threading

import numpy as np
import pytest

import gptx
from gptx.errors import ParameterError
from models import make_config, random_tensors, write_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gptx"
    write_model(path)
    return path


@pytest.fixture(scope="module")
def model(path):
    return gptx.load(path)


def test_a_result_carries_text_ids_reason_and_counts(model):
    result = model.generate("Once", max_new_tokens=5, ignore_eos=True, seed=1)
    assert isinstance(result, gptx.Generation)
    assert result.prompt == "Once"
    assert str(result) == "Once" + result.text
    assert len(result.token_ids) == result.completion_tokens == 5
    assert result.prompt_tokens == 4
    assert result.finish_reason == "length"
    assert result.seed == 1
    assert model.tokenizer.decode(result.token_ids) == result.text


def test_the_same_seed_gives_the_same_text_and_a_drawn_seed_is_reported(model):
    first = model.generate("Once")
    assert model.generate("Once", seed=first.seed).token_ids == first.token_ids
    assert model.generate("Once").seed != first.seed


def test_a_list_of_prompts_gives_each_its_own_result(model):
    prompts = ["prompts", "of any", "different length", "x" * 60]
    results = model.generate(prompts, max_new_tokens=20, seed=5)
    alone = [model.generate(p, max_new_tokens=20, seed=5) for p in prompts]
    assert [r.token_ids for r in results] == [a.token_ids for a in alone]
    assert [r.prompt for r in results] == prompts


def test_a_prompt_may_be_token_ids_of_any_integer_kind(model):
    expected = model.generate("ab", temperature=0).token_ids
    for ids in ([97, 98], (97, 98), np.array([97, 98]), np.array([97, 98], np.uint8)):
        result = model.generate(ids, temperature=0)
        assert result.token_ids == expected
        assert result.prompt == "ab"
    many = model.generate([[97, 98], np.array([97, 98]), "ab"], temperature=0)
    assert [r.token_ids for r in many] == [expected] * 3


def test_streamed_pieces_joined_are_the_text(model):
    stream = model.stream("The princess", max_new_tokens=60, seed=3)
    pieces = list(stream)
    assert "".join(pieces) == stream.result.text
    assert stream.result == model.generate("The princess", max_new_tokens=60, seed=3)
    assert all(pieces)


def test_leaving_a_stream_gives_its_memory_back(model):
    free = model._engine.free_blocks
    for _ in model.stream("The princess", max_new_tokens=50):
        assert model._engine.free_blocks < free
        break
    assert model._engine.free_blocks == free
    stream = model.stream("The princess", max_new_tokens=50)
    next(stream)
    stream.close()
    assert model._engine.free_blocks == free
    assert stream.result.finish_reason == "cancelled"
    model.stream("never started")
    assert model._engine.free_blocks == free


def test_text_ends_before_the_first_stop_string(model):
    free = model.generate("Once", max_new_tokens=60, temperature=0, ignore_eos=True)
    stop = free.text[10:13]
    result = model.generate("Once", max_new_tokens=60, temperature=0, ignore_eos=True, stop=[stop])
    assert result.text == free.text[: free.text.index(stop)]
    assert result.finish_reason == "stop"
    pieces = list(
        model.stream("Once", max_new_tokens=60, temperature=0, ignore_eos=True, stop=stop)
    )
    assert "".join(pieces) == result.text


def test_stop_token_ids_end_the_text_and_min_new_tokens_holds_them_back(model):
    ids = model.generate("Once", max_new_tokens=30, temperature=0, ignore_eos=True).token_ids
    options = dict(max_new_tokens=30, temperature=0, ignore_eos=True, stop_token_ids=[ids[7]])
    result = model.generate("Once", **options)
    assert result.token_ids == ids[: ids.index(ids[7])]
    assert result.finish_reason == "stop"
    assert model.generate("Once", min_new_tokens=30, **options).completion_tokens == 30


def test_logits_have_a_row_for_every_position(model):
    logits = model.logits("Once upon")
    assert logits.shape == (9, 257)
    assert logits.dtype == np.float32
    greedy = model.generate("Once upon", max_new_tokens=1, temperature=0, ignore_eos=True)
    assert greedy.token_ids == (int(logits[-1].argmax()),)


def test_generation_stops_at_the_end_of_the_context(model):
    result = model.generate("x" * 90, max_new_tokens=50, ignore_eos=True)
    assert result.prompt_tokens + result.completion_tokens == model.config.block_size
    assert result.finish_reason == "length"


WRONG = [
    (dict(prompt=""), gptx.ParameterError, "prompt"),
    (dict(prompt=[]), gptx.ParameterError, "prompt"),
    (dict(prompt=[""]), gptx.ParameterError, "prompt"),
    (dict(prompt=7), gptx.ParameterError, "prompt"),
    (dict(prompt=b"bytes"), gptx.GptxError, "prompt|97"),
    (dict(prompt=[257]), gptx.TokenIdError, r"prompt\[0\].*0 to 256, got 257"),
    (dict(prompt=[1, -1]), gptx.TokenIdError, r"prompt\[1\].*got -1"),
    (dict(prompt=[1, 2.0]), gptx.TokenIdError, r"prompt\[1\].*got 2.0"),
    (dict(prompt=[True, 1]), gptx.TokenIdError, r"prompt\[0\].*got True"),
    (dict(prompt=[10**30]), gptx.TokenIdError, r"prompt\[0\]"),
    (dict(prompt="x" * 96), gptx.ContextLengthError, "at most 95 tokens, got 96"),
    (dict(temperature=float("nan")), gptx.ParameterError, "temperature: .*got nan"),
    (dict(temperature=-0.1), gptx.ParameterError, "temperature: .*got -0.1"),
    (dict(temperature=float("inf")), gptx.ParameterError, "temperature"),
    (dict(temperature="hot"), gptx.ParameterError, "temperature: .*got 'hot'"),
    (dict(top_k=-1), gptx.ParameterError, "top_k"),
    (dict(top_k=2.5), gptx.ParameterError, "top_k"),
    (dict(top_p=0), gptx.ParameterError, "top_p"),
    (dict(top_p=1.1), gptx.ParameterError, "top_p"),
    (dict(top_p=float("nan")), gptx.ParameterError, "top_p"),
    (dict(min_p=-0.1), gptx.ParameterError, "min_p"),
    (dict(repetition_penalty=0), gptx.ParameterError, "repetition_penalty"),
    (dict(max_new_tokens=0), gptx.ParameterError, "max_new_tokens"),
    (dict(max_new_tokens=True), gptx.ParameterError, "max_new_tokens"),
    (dict(min_new_tokens=9, max_new_tokens=8), gptx.ParameterError, "min_new_tokens"),
    (dict(seed=-1), gptx.ParameterError, "seed"),
    (dict(seed=2**64), gptx.ParameterError, "seed"),
    (dict(stop=[""]), gptx.ParameterError, "stop"),
    (dict(stop=[3]), gptx.ParameterError, "stop"),
    (dict(stop=3), gptx.ParameterError, "stop: .*got 3"),
    (dict(stop_token_ids=[257]), gptx.TokenIdError, r"stop_token_ids\[0\]"),
    (dict(stop_token_ids=None), gptx.ParameterError, "stop_token_ids: .*got None"),
    (dict(suppress_tokens="ab"), gptx.ParameterError, "suppress_tokens: .*got 'ab'"),
    (dict(forced_tokens=5), gptx.ParameterError, "forced_tokens: .*got 5"),
    (dict(bad_words=5), gptx.ParameterError, "bad_words: .*got 5"),
    (dict(bad_words=["a", ""]), gptx.ParameterError, "bad_words: .*got ''"),
    (dict(bad_words=[7]), gptx.ParameterError, "bad_words: .*got 7"),
    (dict(temprature=1), gptx.ParameterError, "temprature: .* such as temperature, got 1"),
    (dict(params=3), gptx.ParameterError, "params"),
]


@pytest.mark.parametrize(("call", "error", "match"), WRONG, ids=lambda v: str(v)[:40])
def test_a_wrong_call_names_the_parameter_and_the_model_goes_on(model, call, error, match):
    expected = model.generate("Once", temperature=0).token_ids
    with pytest.raises(error, match=match):
        model.generate(**({"prompt": "Once"} | call))
    assert model.generate("Once", temperature=0).token_ids == expected
    assert isinstance(
        error("x", 1, "y") if error is gptx.ParameterError else ValueError(), ValueError
    )


def test_the_wrong_prompt_of_a_list_is_named(model):
    with pytest.raises(gptx.ParameterError, match=r"^prompt\[1\]: expected at least one token"):
        model.generate(["a", ""])
    with pytest.raises(gptx.ContextLengthError, match=r"^prompt\[2\]: .*got 96") as caught:
        model.generate(["a", "b", "x" * 96])
    assert caught.value.param == "prompt[2]"
    with pytest.raises(gptx.TokenIdError, match=r"^prompt\[1\]\[0\]"):
        model.generate(["a", [999]])


def test_no_stop_and_one_bad_word_are_what_they_say(model):
    plain = model.generate("Once", temperature=0)
    assert model.generate("Once", temperature=0, stop=None).text == plain.text
    likes_t = dict(temperature=0, logit_bias={ord("t"): 50.0})
    assert "tt" in model.generate("Once", **likes_t).text
    banned = model.generate("Once", bad_words="tt", **likes_t)
    assert banned.text == model.generate("Once", bad_words=["tt"], **likes_t).text
    assert "t" in banned.text
    assert "tt" not in banned.text


def test_a_stream_is_closed_by_with_and_may_be_read_by_several_threads(model):
    with model.stream("Once", max_new_tokens=50, ignore_eos=True) as stream:
        next(stream)
    assert model._engine.stats()["requests"] == 0
    expected = model.generate("Once", max_new_tokens=80, seed=1).text
    stream = model.stream("Once", max_new_tokens=80, seed=1)
    pieces = []
    readers = [threading.Thread(target=lambda: pieces.extend(stream)) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert sorted("".join(pieces)) == sorted(expected)


def test_stream_and_logits_refuse_what_they_cannot_take(model):
    with pytest.raises(gptx.ParameterError, match="one prompt"):
        model.stream(["a", "b"])
    with pytest.raises(gptx.ContextLengthError, match="at most 96 tokens"):
        model.logits([1] * 97)
    assert model.logits([1] * 96).shape == (96, 257)
    with pytest.raises(gptx.ParameterError, match="prompt"):
        model.logits("")


def test_one_bad_prompt_refuses_the_whole_list_before_anything_runs(model):
    free = model._engine.free_blocks
    with pytest.raises(gptx.TokenIdError):
        model.generate(["good", [999]])
    assert model._engine.free_blocks == free


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(device="tpu"), "device: expected one of cpu, cuda, cuda:N, auto, got 'tpu'"),
        (dict(threads=0), "threads: expected an integer from 1 to 1024, got 0"),
        (dict(threads=2.0), "threads"),
        (dict(kv_cache_bytes=-1), "kv_cache_bytes"),
        (dict(kv_cache_bytes=1 << 60), "kv_cache_bytes: expected at most the memory"),
        (dict(isa="mmx"), "isa: expected one of .*scalar, got 'mmx'"),
    ],
)
def test_load_names_the_argument_that_is_wrong(path, options, match):
    with pytest.raises(gptx.GptxError, match=match):
        gptx.load(path, **options)


def test_a_path_that_is_none_is_refused():
    with pytest.raises(gptx.ParameterError, match="path: .*got 5"):
        gptx.load(5)


def test_a_missing_file_is_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.gptx"):
        gptx.load(tmp_path / "nowhere.gptx")


def test_the_environment_chooses_isa_and_threads(path, monkeypatch):
    monkeypatch.setenv("GPTX_CPU_ISA", "scalar")
    monkeypatch.setenv("GPTX_NUM_THREADS", "3")
    model = gptx.load(path)
    assert (model.isa, model.threads) == ("scalar", 3)
    monkeypatch.setenv("GPTX_NUM_THREADS", "many")
    with pytest.raises(gptx.ParameterError, match="GPTX_NUM_THREADS: .*got 'many'"):
        gptx.load(path)


def test_logits_that_overflow_raise_alone_and_are_carried_in_a_list(tmp_path):
    config = make_config(vocab_size=257)
    tensors = random_tensors(config)
    tensors["wpe.weight"][6] = 3e38  # overflows, for the longer prompt only
    write_model(tmp_path / "huge.gptx", tensors)
    model = gptx.load(tmp_path / "huge.gptx")
    with pytest.raises(gptx.NonFiniteLogitsError, match="position 8"):
        model.generate("12345678", max_new_tokens=2)
    long, short = model.generate(["12345678", "12"], max_new_tokens=3, ignore_eos=True)
    assert isinstance(long.error, gptx.NonFiniteLogitsError)
    assert long.finish_reason == "error"
    assert short.error is None
    assert short.completion_tokens == 3


def test_threads_share_a_model_and_each_gets_what_it_gets_alone(model):
    prompts = [f"prompt {i} " * (1 + i % 4) for i in range(8)]
    expected = [model.generate(p, max_new_tokens=40, seed=i) for i, p in enumerate(prompts)]
    results = [None] * len(prompts)

    def work(i):
        for _ in range(5):
            results[i] = model.generate(prompts[i], max_new_tokens=40, seed=i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == expected


def test_generate_keeps_the_model_of_a_path_loaded(path, monkeypatch):
    first = gptx.generate("Once", model=path, seed=1)
    assert gptx.generate("Once", model=str(path), seed=1) == first
    monkeypatch.setenv("GPTX_MODEL", str(path))
    assert gptx.generate("Once", seed=1) == first


def test_the_built_in_demo_writes_english_and_chinese():
    for prompt in ("Once upon a time", "床前明月光，", "你好，世界！"):
        pieces = list(gptx.load().stream(prompt, max_new_tokens=60, seed=1))
        assert "\ufffd" not in "".join(pieces)
        assert len("".join(pieces)) > 20


def test_ids_that_the_tokenizer_does_not_name_are_no_text(tmp_path):
    write_model(tmp_path / "m.gptx", vocab_size=320)
    model = gptx.load(tmp_path / "m.gptx")
    result = model.generate([260, 300, 97], max_new_tokens=40, seed=1, temperature=3.0, top_k=0)
    assert max(result.token_ids) > 256
    assert result.prompt == "a"
    named = [i for i in result.token_ids if i < 257]
    assert result.text == model.tokenizer.decode(named)


def test_a_plan_is_what_is_then_taken(tmp_path):
    write_model(tmp_path / "m.gptx", block_size=1024, n_embd=256, n_head=4, vocab_size=5000)
    code = (
        "import sys, gptx\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "before = resident()\n"
        "model = gptx.load(sys.argv[1], prefix_cache_bytes=0)\n"
        "plan = model.plan(batch=20, context=1024)\n"
        "model.generate([[i] * 900 for i in range(20)], max_new_tokens=124, temperature=0.0)\n"
        "print(plan.total, resident() - before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.gptx")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    planned, taken = map(int, result.stdout.split())
    assert 0.8 * planned < taken < 1.1 * planned + (20 << 20)


@pytest.mark.parametrize(
    ("arguments", "param"), [(dict(batch=0), "batch"), (dict(context=97), "context")]
)
def test_a_plan_refuses_what_cannot_be(model, arguments, param):
    with pytest.raises(ParameterError) as caught:
        model.plan(**arguments)
    assert caught.value.param == param
