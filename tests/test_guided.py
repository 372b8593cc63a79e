"""Guided output: every text matches, whatever is drawn, and ends where it is complete."""

import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest

import gptx
from gptx import cli, guided, modelfile
from gptx.checkpoints.tokenizer_files import from_chars
from models import make_config, random_tensors, write_model

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def demo():
    return gptx.load()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model of bytes; its vocabulary is padded with ids that have none."""
    path = tmp_path_factory.mktemp("model") / "tiny.gptx"
    write_model(path, vocab_size=300, block_size=256)
    return gptx.load(path)


CHARACTERS = ' "{}[]:,.-0123456789abcdefghijklmnopqrstuvwxyz床前明月光'


@pytest.fixture(scope="module")
def chars(tmp_path_factory):
    """A random model of characters, without an end token."""
    path = tmp_path_factory.mktemp("model") / "chars.gptx"
    config = make_config(vocab_size=len(CHARACTERS))
    tokenizer = from_chars({c: i for i, c in enumerate(CHARACTERS)})
    modelfile.write(path, config, random_tensors(config), tokenizer=tokenizer)
    return gptx.load(path)


@pytest.fixture(params=["demo", "tiny", "chars"])
def model(request):
    return request.getfixturevalue(request.param)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def is_of_schema(text):
    value = json.loads(text)
    assert list(value) in (["name", "age", "tags"], ["name", "age", "tags", "ok"])
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 8
    assert type(value["age"]) is int
    assert 0 <= value["age"] <= 150
    assert len(value["tags"]) <= 3
    assert set(value["tags"]) <= {"a", "b"}
    assert type(value.get("ok", True)) is bool
    return True


CHOICES = ["yes", "no", "ab", "abc", "床前明月光", "床前", "月"]
GRAMMAR = """
start: sum "."
sum: NUMBER | sum "," NUMBER | "[" sum "]"
NUMBER: /[0-9]{1,3}/
"""


def is_sum(text):
    return re.fullmatch(r"[0-9,\[\]]+\.", text) and text.count("[") == text.count("]")


GUIDES = {
    "regex": (guided.regex(r"[a-f]{2,5}-[0-9]{4}"), re.compile("[a-f]{2,5}-[0-9]{4}").fullmatch),
    "chinese": (guided.regex("(床|前){1,2}[明月光]"), re.compile("(床|前){1,2}[明月光]").fullmatch),
    "choices": (guided.choices(CHOICES), CHOICES.__contains__),
    "grammar": (guided.grammar(GRAMMAR), is_sum),
    "schema": (guided.json_schema(SCHEMA), is_of_schema),
}
WILD = dict(temperature=1.5, top_k=0, top_p=1.0, max_new_tokens=100)


@pytest.mark.parametrize("name", GUIDES)
def test_every_one_of_two_hundred_samples_matches(model, name):
    guide, matches = GUIDES[name]
    results = model.generate(["a", "1 2"], guide=guide, n=100, seed=7, **WILD)
    found = [choice for result in results for choice in result.choices]
    assert len(found) == 200
    complete = [choice.text for choice in found if choice.finish_reason == "stop"]
    assert {choice.finish_reason for choice in found} <= {"stop", "length"}
    assert all(matches(text) for text in complete)
    assert len(complete) == 200 or name in ("grammar", "schema")
    assert len(complete) >= 100
    assert len(set(complete)) > 1


def test_any_json_is_json(demo):
    results = demo.generate(["JSON: "], guide=guided.json_schema(True), n=60, seed=3, **WILD)
    complete = [c.text for c in results[0].choices if c.finish_reason == "stop"]
    assert len(complete) > 20
    for text in complete:
        json.loads(text)
    assert guided.json_schema(" true ") == guided.json_schema(True)


def test_json_is_spaced_as_by_json_dumps_unless_the_schema_says_otherwise(tiny):
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3}
    text = tiny.generate("x", guide=guided.json_schema(schema), seed=1).text
    assert text == json.dumps(json.loads(text))
    flexible = schema | {"x-guidance": {"whitespace_flexible": True}}
    texts = tiny.generate("x", guide=guided.json_schema(flexible), n=20, seed=1, **WILD).choices
    assert any("  " in choice.text or "\n" in choice.text for choice in texts)


def test_a_guide_is_the_same_alone_in_a_batch_and_in_a_stream(model):
    options = dict(guide=GUIDES["regex"][0], seed=5, max_new_tokens=40)
    prompts = ["a", "abc " * 12, "1"]
    alone = [model.generate(p, **options) for p in prompts]
    batch = model.generate(prompts, **options)
    assert [r.token_ids for r in batch] == [r.token_ids for r in alone]
    stream = model.stream("a", **options)
    assert "".join(stream) == alone[0].text
    assert stream.result.token_ids == alone[0].token_ids


def test_guesses_of_what_must_come_change_nothing(model, monkeypatch):
    ways = [
        dict(temperature=0.0),
        dict(temperature=1.0, seed=2, logprobs=2),
        dict(temperature=0.7, seed=3, prompt_lookup=8),
        dict(temperature=1.3, seed=4, n=3),
    ]
    guides = [guided.json_schema(SCHEMA), guided.choices(CHOICES), guided.grammar(GRAMMAR)]
    calls = [way | dict(guide=guide, max_new_tokens=60) for way in ways for guide in guides]
    guessed = [model.generate("a", **call) for call in calls]
    assert sum(result.drafted_tokens for result in guessed) > 0
    monkeypatch.setattr(guided.GuideState, "forced", lambda self: [])
    plain = [model.generate("a", **call | dict(prompt_lookup=0)) for call in calls]
    for one, other in zip(guessed, plain, strict=True):
        assert [c.token_ids for c in one.choices] == [c.token_ids for c in other.choices]
        assert one.logprobs == other.logprobs


def test_a_model_that_spells_as_its_tokenizer_writes_what_must_come_at_once(demo):
    steps = demo._engine.stats()["steps"]
    keys = {f"the name of number {i}": {"const": i} for i in range(4)}
    schema = dict(type="object", properties=keys, required=list(keys), additionalProperties=False)
    result = demo.generate("x", guide=guided.json_schema(schema), temperature=0, max_new_tokens=120)
    assert json.loads(result.text) == {key: i for i, key in enumerate(keys)}
    assert result.completion_tokens > 2 * (demo._engine.stats()["steps"] - steps)


def test_guided_and_other_requests_share_steps_and_change_nothing(tiny):
    from gptx import jobs

    changes = [
        dict(guide=GUIDES["schema"][0]),
        dict(),
        dict(guide=GUIDES["choices"][0], n=3),
        dict(n=2, temperature=1.2),
        dict(guide=GUIDES["grammar"][0], temperature=0),
        dict(logits_processors=[lambda ids, logits: -logits]),
        dict(guide=GUIDES["chinese"][0], prompt_lookup=4),
    ]

    def start(i):
        params = gptx.SamplingParams(**dict(seed=9, max_new_tokens=40) | changes[i])
        return jobs.start(tiny._task("Once " * (1 + i), params))

    def run(started):
        while running := [job for job in started if not job.finished]:
            jobs.step(tiny._engine, running)
        return [[c.token_ids for c in job.generation().choices] for job in started]

    free = tiny._engine.free_blocks
    expected = [run([start(i)])[0] for i in range(len(changes))]
    assert run([start(i) for i in range(len(changes))]) == expected
    assert tiny._engine.free_blocks == free


def test_characters_of_several_tokens_are_never_cut(tiny):
    for seed in range(30):
        stream = tiny.stream("x", guide=guided.choices(["床前", "床头", "é"]), seed=seed)
        pieces = list(stream)
        assert "".join(pieces) in ("床前", "床头", "é")
        assert all("\ufffd" not in piece for piece in pieces)


def test_ids_without_a_token_and_special_ones_never_come(tiny):
    result = tiny.generate(
        "x",
        guide=guided.regex("(?s:.*)"),
        ignore_eos=True,
        max_new_tokens=200,
        seed=1,
        **{"temperature": 3.0, "top_k": 0, "top_p": 1.0},
    )
    assert result.completion_tokens == 200
    assert max(result.token_ids) < 256


def test_the_length_may_cut_a_text_which_says_so(tiny):
    cut = tiny.generate("x", guide=guided.regex("[a-z]{10}"), max_new_tokens=4, seed=1)
    assert (cut.finish_reason, cut.completion_tokens) == ("length", 4)
    exact = tiny.generate("x", guide=guided.regex("[a-z]{10}"), max_new_tokens=10, seed=1)
    assert exact.finish_reason == "stop"
    stopped = tiny.generate("x", guide=guided.choices(["one, two"]), stop=",", seed=1)
    assert (stopped.text, stopped.finish_reason) == ("one", "stop")


def test_a_model_without_an_end_token_ends_where_nothing_can_follow(chars):
    assert chars._tokenizer.eos_token_id is None
    result = chars.generate("a", guide=guided.regex("[a-c]{3}"), seed=1)
    assert (result.finish_reason, result.completion_tokens) == ("stop", 3)
    longer = chars.generate("a", guide=guided.choices(["ab", "abc"]), seed=1)
    assert (longer.text, longer.finish_reason) == ("abc", "stop")
    open_ended = chars.generate("a", guide=guided.regex("[a-c]+"), max_new_tokens=20, seed=1)
    assert (open_ended.finish_reason, open_ended.completion_tokens) == ("length", 20)


def allowed_by(state, size):
    bits = np.unpackbits(state.mask().view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits[:size]).tolist())


def test_a_mask_is_what_a_search_among_all_texts_finds(tiny):
    texts = ["".join(t) for n in (2, 3) for t in itertools.product("ab床", repeat=n)]
    encoded = [text.encode() for text in texts]
    state = guided.regex("[ab床]{2,3}").start(tiny, [256, 257])
    rng = np.random.default_rng(0)
    so_far = b""
    while not state.is_finished:
        n = len(so_far)
        expected = {t[n] for t in encoded if t.startswith(so_far) and len(t) > n}
        assert state.is_accepting == (so_far in encoded)
        assert allowed_by(state, 300) == expected | ({256, 257} if so_far in encoded else set())
        token = int(rng.choice(sorted(expected)))
        other = state.copy()
        state.accept(token)
        assert allowed_by(other, 300) >= expected  # a copy goes its own way
        so_far += bytes([token])
    assert so_far in encoded
    assert allowed_by(state, 300) == {256, 257}
    with pytest.raises(gptx.ParameterError, match="guide"):
        state.accept(97)


def test_an_end_token_finishes_a_state_and_a_wrong_token_is_refused(tiny):
    state = guided.choices(["a", "ab"]).start(tiny, [256])
    for wrong in (98, 256, 299):
        with pytest.raises(gptx.ParameterError, match="guide: expected a token after 0 tokens"):
            state.copy().accept(wrong)
    state.accept(97)
    assert not state.is_finished
    state.accept(256)
    assert state.is_finished
    assert state.copy().is_finished


BROKEN = [
    (guided.regex("("), "unclosed group"),
    (guided.regex("(?=a)b"), "look-ahead"),
    (guided.grammar("start: nothing"), "nothing"),
    (guided.grammar(""), "start|grammar"),
    (guided.json_schema({"type": "number-ish"}), "number-ish"),
    (guided.json_schema("{not json"), "key must be a string"),
    (guided.json_schema({"$ref": "#/nowhere"}), "nowhere"),
    (guided.json_schema({"not": {"type": "string"}}), "not"),
    (guided.json_schema('{"items":' * 10_000 + "{}" + "}" * 10_000), "recursion limit"),
    (guided.regex("(" * 10_000 + ")" * 10_000), "invalid regex"),
    (guided.grammar("start: " + "(" * 10_000 + '"a"' + ")" * 10_000), "nested"),
]


@pytest.mark.parametrize(("guide", "match"), BROKEN, ids=lambda v: str(v)[:40])
def test_a_guide_that_is_none_is_refused_before_anything_runs(tiny, guide, match):
    free = tiny._engine.free_blocks
    with pytest.raises(gptx.ParameterError, match=f"^guide: expected what llguidance.*{match}"):
        tiny.generate(["x", "y"], guide=guide)
    with pytest.raises(gptx.ParameterError, match="guide"):
        tiny.stream("x", guide=guide)
    assert tiny._engine.free_blocks == free
    assert tiny.generate("x", guide=guided.choices(["fine"])).text == "fine"


def test_a_guide_that_no_text_can_match_is_an_error_of_its_request(tiny, chars):
    free = tiny._engine.free_blocks
    with pytest.raises(gptx.ParameterError, match="go on with after 0 tokens"):
        tiny.generate("x", guide=guided.regex(r"[^\s\S]"))
    results = tiny.generate(["x", "y"], guide=guided.regex(r"[^\s\S]"))
    assert all(isinstance(r.error, gptx.ParameterError) for r in results)
    assert [r.finish_reason for r in results] == ["error", "error"]
    assert tiny._engine.free_blocks == free
    with pytest.raises(gptx.ParameterError, match="go on with after 0 tokens"):
        chars.generate("a", guide=guided.choices(["é"]))
    with pytest.raises(gptx.ParameterError, match="go on with after 2 tokens"):
        chars.generate("a", guide=guided.choices(["abé"]))
    assert chars.generate("a", guide=guided.choices(["é", "ab"])).text == "ab"


WRONG = [
    (guided.json_schema, 7, "schema"),
    (guided.json_schema, False, "schema"),
    (guided.json_schema, {"a": {1, 2}}, "schema"),
    (guided.regex, re.compile("a"), "pattern"),
    (guided.grammar, None, "lark"),
    (guided.choices, "abc", "texts"),
    (guided.choices, [], "texts"),
    (guided.choices, ["a", ""], "texts"),
    (guided.choices, [1], "texts"),
    (guided.choices, ["\ud800"], "guide"),
    (guided.regex, "\udfff", "guide"),
]


@pytest.mark.parametrize(("make", "value", "name"), WRONG, ids=lambda v: str(v)[:20])
def test_a_description_of_another_type_is_refused_by_name(make, value, name):
    with pytest.raises(gptx.ParameterError, match=f"^{name}: expected"):
        make(value)


def test_guides_are_values():
    assert guided.regex("a") == guided.regex("a")
    assert len({guided.regex("a"), guided.regex("a"), guided.choices(["a"])}) == 2
    assert guided.json_schema({"b": 1, "a": 2}) == guided.json_schema('{"b": 1, "a": 2}')
    with pytest.raises(AttributeError):
        guided.regex("a").text = "b"


def test_characters_that_mean_something_elsewhere_are_choices_too(tiny):
    texts = [
        'a"b',
        "a\\b",
        "a/b",
        "(a|b)*",
        "a\nb",
        "[x]-~&#",
        "<|endoftext|>",
        "\t\x00 \x7f",
        "$^",
    ]
    result = tiny.generate("x", guide=guided.choices(texts), n=60, seed=1, **WILD)
    found = {choice.text for choice in result.choices}
    assert found <= set(texts)
    for text in texts:
        assert tiny.generate("x", guide=guided.choices([text])).text == text


def test_a_text_that_is_cut_off_is_an_error_of_the_command():
    command = [sys.executable, "-m", "gptx", "x", "--json-schema", '{"type": "object"}', "-n", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert (
        result.stderr
        == "gptx: the text was cut off after 1 tokens (length) and may be incomplete\n"
    )
    command[command.index("--json-schema") + 1] = "[1, 2]"
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "guide: expected what llguidance accepts" in result.stderr


def test_without_the_package_the_extra_is_named(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    guide = guided.regex("only here")
    with pytest.raises(gptx.MissingExtraError, match=r'pip install "gptx\[guided\]"'):
        tiny.generate("x", guide=guide)


def test_importing_gptx_does_not_import_llguidance():
    code = "import sys, gptx.guided; gptx.guided.regex('a'); assert 'llguidance' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_takes_guides(capsys, tmp_path):
    def written(*arguments, code=0):
        assert cli.main(["generate", "Once", "--seed", "1", *arguments]) == code
        return capsys.readouterr().out.removeprefix("Once").removesuffix("\n")

    assert written("--choice", "yes", "--choice", "no") in ("yes", "no")
    assert re.fullmatch("[0-9]{4}", written("--regex", "[0-9]{4}"))
    assert written("--json-schema", '{"enum": [17]}') == "17"
    (tmp_path / "schema.json").write_text('{"const": "é"}', encoding="utf-8")
    assert written("--json-schema", str(tmp_path / "schema.json")) == '"é"'
    json.loads(
        written("--json-schema", "true", "-n", "400", code=1)
    )  # a number that goes on and on
    (tmp_path / "grammar.lark").write_text('start: "a" "b"')
    assert written("--grammar", str(tmp_path / "grammar.lark")) == "ab"
    for wrong in (["--regex", "("], ["--json-schema", "nowhere.json"], ["--choice", ""]):
        assert cli.main(["generate", "Once", *wrong]) == 1
        assert capsys.readouterr().err.startswith("gptx: error: ")
