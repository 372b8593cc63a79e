"""Pipelines and streamers: the texts and pieces of transformers."""

import subprocess
import sys
import threading
from queue import Empty

import pytest
from hf_samples import PROMPTS, quietly

from gptx import hf
from gptx.errors import GptxError

GREEDY = dict(do_sample=False, max_new_tokens=9)
CALLS = {
    "plain": GREEDY,
    "new text": GREEDY | dict(return_full_text=False),
    "ids": GREEDY | dict(return_tensors=True),
    "special tokens": GREEDY | dict(skip_special_tokens=False),
    "max_length": dict(do_sample=False, max_length=12),
    "min_length": GREEDY | dict(min_length=8),
    "prefix": GREEDY | dict(prefix="Once there was. "),
    "prefix and max_length": dict(do_sample=False, max_length=14, prefix="Once there was. "),
    "stop_sequence": GREEDY | dict(stop_sequence="e"),
    "hole": GREEDY | dict(handle_long_generation="hole", max_new_tokens=90),
    "changes": GREEDY | dict(repetition_penalty=1.3, no_repeat_ngram_size=2),
    "truncation": GREEDY | dict(tokenizer_encode_kwargs=dict(truncation=True, max_length=3)),
}


def made(lib, **arguments):
    """A pipeline; the models are transformers' own, so it reads the same file."""
    return lib.library.pipeline(
        "text-generation", model=lib.model, tokenizer=lib.tokenizer, **arguments
    )


@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
def test_records_are_those_of_transformers(pair, arguments):
    def script(lib):
        generator = made(lib)
        prompts = [p for p in PROMPTS if len(p) > 3]
        return generator("One day", **arguments), generator(prompts, **arguments)

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_up_to_256_tokens_are_sampled_by_default(pair):
    generator = made(pair.ours)
    short = generator("One day", max_new_tokens=3, seed=1)
    options = dict(do_sample=True, temperature=0.7, seed=1)
    assert generator("One day", max_new_tokens=3, **options) == short
    assert generator("One day", max_new_tokens=256, **options) == generator("One day", seed=1)


def test_an_empty_text_is_continued(pair):
    ours, theirs = pair.run(lambda lib: made(lib)("", **GREEDY))
    assert ours == theirs


def test_arguments_of_the_pipeline_are_defaults_of_its_calls(pair):
    def script(lib):
        generator = made(lib, **GREEDY, return_full_text=False)
        return generator("One day"), generator(["One day"], max_new_tokens=3)

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_beams_of_a_pipeline_come_as_several_records(pair):
    def script(lib):
        return made(lib)(["One day", "a"], num_beams=3, num_return_sequences=2, **GREEDY)

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_samples_are_nested_as_in_transformers(pair):
    def script(lib):
        found = made(lib)(["One day", "a"], num_return_sequences=3, max_new_tokens=4)
        return [[sorted(record) for record in records] for records in found]

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_a_generator_of_texts_is_read_as_it_is_needed(folder):
    read = []

    def texts():
        for text in ("One day", "a"):
            read.append(text)
            yield text

    generator = hf.pipeline("text-generation", model=folder)
    records = generator(texts(), **GREEDY)
    assert read == []
    first = next(records)
    assert read == ["One day"]
    assert first == generator("One day", **GREEDY)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (dict(text_inputs=7), "text_inputs"),
        (dict(text_inputs=[{"role": "user", "content": "a"}]), "text_inputs"),
        (dict(return_full_text=True, return_tensors=True), "return_full_text"),
        (dict(handle_long_generation="cut"), "handle_long_generation"),
        (dict(return_dict_in_generate=True), "return_dict_in_generate"),
        (dict(max_new_token=3), "max_new_token"),
        (dict(tools=[]), "tools"),
    ],
    ids=str,
)
def test_a_pipeline_refuses_by_name(folder, arguments, name):
    generator = hf.pipeline("text-generation", model=folder)
    with pytest.raises(GptxError, match=rf"^{name}\b"):
        generator(**({"text_inputs": "One"} | arguments))


def test_another_task_is_refused(folder):
    with pytest.raises(GptxError, match="^task: .*'fill-mask'"):
        hf.pipeline("fill-mask", model=folder)


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_what_a_streamer_prints_is_what_transformers_prints(pair, capsys, skip_prompt):
    printed = {}
    for name, lib in (("ours", pair.ours), ("theirs", pair.theirs)):
        for text in PROMPTS:
            streamer = lib.library.TextStreamer(lib.tokenizer, skip_prompt=skip_prompt)
            inputs = lib.tokenizer(text, return_tensors="pt")
            quietly(lambda m, i, s: m.generate(**i, streamer=s), lib.model, inputs, streamer)
        printed[name] = capsys.readouterr().out
    assert printed["ours"] == printed["theirs"]
    assert printed["ours"]


@pytest.mark.parametrize("arguments", [{}, dict(repetition_penalty=1.3, begin_suppress_tokens=[5])])
def test_pieces_of_an_iterator_are_those_of_transformers(pair, arguments):
    def script(lib):
        pieces = []
        for text in PROMPTS:
            streamer = lib.library.TextIteratorStreamer(
                lib.tokenizer, skip_special_tokens=True, timeout=60
            )
            inputs = lib.tokenizer(text, return_tensors="pt")
            options = dict(**inputs, streamer=streamer, max_new_tokens=12, **arguments)
            thread = threading.Thread(target=lib.model.generate, kwargs=options)
            thread.start()
            pieces.append(list(streamer))
            thread.join()
        return pieces

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_an_iterator_that_gets_nothing_gives_up_in_time(pair):
    streamer = hf.TextIteratorStreamer(pair.ours.tokenizer, timeout=0.01)
    with pytest.raises(Empty):
        next(streamer)


def test_a_streamer_of_the_script_gets_every_token_of_a_batch(pair):
    def script(lib):
        put = []

        class Streamer:
            def put(self, value):
                put.append(value.tolist())

            def end(self):
                put.append("end")

        lib.model.generate(**lib.padded(PROMPTS), max_new_tokens=8, streamer=Streamer())
        return put

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_a_text_streamer_takes_one_text(pair):
    streamer = hf.TextStreamer(pair.ours.tokenizer)
    with pytest.raises(GptxError, match="^streamer"):
        pair.ours.generate(PROMPTS, streamer=streamer)
    with pytest.raises(GptxError, match="^streamer"):
        pair.ours.generate(PROMPTS[:1], streamer=streamer, num_beams=2)


SCRIPT = """
import sys
from gptx.hf import AutoModelForCausalLM, AutoTokenizer, pipeline, set_seed
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map="auto", torch_dtype="auto")
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=8)[0]))
set_seed(0)
print(pipeline("text-generation", model=sys.argv[1])("Once", max_new_tokens=5))
assert not {"torch", "transformers"} & set(sys.modules)
"""


def test_a_script_runs_without_torch(folder):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Once upon a time")
