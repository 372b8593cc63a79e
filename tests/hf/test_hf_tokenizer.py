"""The tokenizer: ids, masks and texts of transformers, for padding, truncation and decoding."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hf_samples import END, PROMPTS, TEXT

from gptx import TokenizeError, hf
from gptx.errors import GptxError, ParameterError
from models import write_model

TEXTS = [*PROMPTS, "", " ", f"a{END}b{END}", f"{END}", "\u200d👩‍🔬 é\u0301", "tabs\tand\r\nlines  "]
CALLS = {
    "plain": {},
    "longest": dict(padding=True),
    "longest by name": dict(padding="longest"),
    "max_length": dict(padding="max_length", max_length=12),
    "max_length of the model": dict(padding="max_length"),
    "truncation": dict(truncation=True, max_length=4),
    "truncation of the model": dict(truncation=True),
    "max_length alone": dict(max_length=3),
    "both": dict(padding=True, truncation=True, max_length=5),
    "both to max_length": dict(padding="max_length", truncation=True, max_length=5),
    "multiple": dict(padding=True, pad_to_multiple_of=8),
    "left": dict(padding=True, padding_side="left"),
    "right": dict(padding=True, padding_side="right"),
    "no mask": dict(padding=True, return_attention_mask=False),
    "no special tokens": dict(add_special_tokens=False),
    "split special tokens": dict(split_special_tokens=True),
    "not truncated": dict(truncation=False),
}


def merges_of(tokens):
    """The two parts of each token: what merging its bytes by the earlier ranks leaves."""
    ranks = {token: i for i, token in enumerate(tokens)}
    for token in tokens[256:]:
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, len(tokens)) for a, b in pairwise(parts)]
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        yield parts


def as_lists(encoding):
    return {name: np.asarray(value, dtype=object).tolist() for name, value in encoding.items()}


@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
def test_encodings_are_those_of_transformers(pair, arguments):
    def script(lib):
        lib.padded(["a"])
        every = [as_lists(lib.tokenizer(text, **arguments)) for text in TEXTS]
        return every, as_lists(lib.tokenizer(TEXTS, **arguments))

    ours, theirs = pair.run(script)
    assert ours == theirs


@pytest.mark.parametrize("side", ["left", "right"])
def test_sides_of_padding_and_truncation_are_attributes(pair, side):
    def script(lib):
        lib.padded(["a"], side)
        lib.tokenizer.truncation_side = side
        out = lib.tokenizer(TEXTS, padding=True, truncation=True, max_length=6)
        lib.tokenizer.truncation_side = "right"
        return as_lists(out)

    ours, theirs = pair.run(script)
    assert ours == theirs


@pytest.mark.parametrize("kind", ["np", "pt"])
def test_tensors_have_the_type_that_was_asked_for(pair, kind):
    def script(lib):
        lib.padded(["a"])
        one = lib.tokenizer("Once upon", return_tensors=kind)
        many = lib.tokenizer(PROMPTS, padding=True, return_tensors=kind)
        ids = lib.tokenizer.encode("Once upon", return_tensors=kind)
        empty = lib.tokenizer("", return_tensors=kind).input_ids
        tensors = [one.input_ids, many["attention_mask"], ids, empty]
        return [(type(t), str(t.dtype), tuple(t.shape), t.tolist()) for t in tensors]

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_texts_are_decoded_as_in_transformers(pair):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, pair.ours.tokenizer.vocab_size, (40, 9))
    rows[::3, 4] = pair.ours.end

    def script(lib):
        t = lib.tokenizer
        return (
            [t.decode(row) for row in rows],
            [t.decode(row.tolist(), skip_special_tokens=True) for row in rows],
            t.batch_decode(rows, skip_special_tokens=True),
            t.batch_decode([row[:5].tolist() for row in rows]),
            t.decode(rows),
            t.decode(5),
            t.decode([]),
            t.batch_decode([]),
            t.decode([7, 100_000, 8]),
            t.decode(rows[0], clean_up_tokenization_spaces=True),
        )

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_tokens_and_ids_are_converted_as_in_transformers(pair):
    def script(lib):
        t = lib.tokenizer
        tokens = t.tokenize(TEXT)
        return (
            tokens,
            t.convert_tokens_to_ids(tokens),
            t.convert_ids_to_tokens(list(range(len(t)))),
            t.convert_ids_to_tokens([t.eos_token_id, 5], skip_special_tokens=True),
            t.convert_ids_to_tokens(7),
            t.convert_tokens_to_ids("no such token"),
            t.convert_tokens_to_string(tokens),
            sorted(t.get_vocab().items()),
            (len(t), t.vocab_size, t.model_max_length, t.is_fast),
            (t.eos_token, t.bos_token, t.unk_token, t.eos_token_id, t.bos_token_id),
            (t.all_special_tokens, t.all_special_ids, t.special_tokens_map),
            t.model_input_names,
        )

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_a_pad_token_may_be_set_by_text_by_id_and_as_a_new_one(pair):
    def script(lib):
        t = lib.library.AutoTokenizer.from_pretrained(pair.folder)
        found = [(t.pad_token, t.pad_token_id)]
        t.pad_token = t.eos_token
        found.append((t.pad_token, t.pad_token_id))
        t.pad_token_id = 7
        found.append((t.pad_token, t.pad_token_id))
        found.append((t.add_special_tokens({"pad_token": "[PAD]"}), len(t), t.vocab_size))
        found.append((t.pad_token, t.pad_token_id))
        found.append(as_lists(t(["a[PAD]b", "once upon a"], padding=True)))
        found.append(t.decode([5, t.pad_token_id, 6], skip_special_tokens=True))
        return found

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_settings_of_the_call_replace_those_of_the_folder(pair):
    def script(lib):
        t = lib.library.AutoTokenizer.from_pretrained(
            pair.folder, padding_side="left", pad_token=END, use_fast=True, model_max_length=5
        )
        return as_lists(t(PROMPTS, padding=True, truncation=True)), t.padding_side

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_pad_gives_encodings_one_length(pair):
    def script(lib):
        t = lib.tokenizer
        lib.padded(["a"])
        return as_lists(t.pad([t(text) for text in PROMPTS[:4]], return_tensors="np"))

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_gpt2s_own_vocabulary_gives_the_ids_of_transformers():
    transformers = pytest.importorskip("transformers")
    from gptx.checkpoints.tokenizer_files import gpt2_spec

    try:
        spec = gpt2_spec()
    except TokenizeError as error:
        pytest.skip(f"optional test data: {error}")
    ours = hf.GPT2Tokenizer(spec)
    spelling = {token: ours.convert_ids_to_tokens(i) for i, token in enumerate(spec.tokens)}
    merges = [tuple(spelling[part] for part in parts) for parts in merges_of(spec.tokens)]
    vocab = ours.get_vocab()
    theirs = transformers.GPT2Tokenizer(vocab=vocab, merges=merges)
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids, text
    assert len(ours) == len(theirs) == 50257
    assert ours.eos_token_id == theirs.eos_token_id == 50256


def test_a_gptx_file_has_its_tokenizer_inside(tmp_path):
    write_model(tmp_path / "m.gptx")
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "m.gptx")
    assert tokenizer("ab").input_ids == [97, 98]
    assert tokenizer(END).input_ids == [256]
    assert tokenizer.convert_ids_to_tokens([32, 97]) == ["Ġ", "a"]
    assert tokenizer.model_max_length == 96


@pytest.mark.parametrize("says_so", ["tokenizer.json", "tokenizer_config.json"])
def test_bos_is_put_in_front_where_it_is_in_transformers(pair, tmp_path, says_so):
    import transformers

    for path in pair.folder.glob("*token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    changed = json.loads((tmp_path / says_so).read_text())
    if says_so == "tokenizer.json":
        bos = pair.ours.tokenizer.bos_token
        first, text = (
            {"SpecialToken": {"id": bos, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        )
        known = {bos: {"id": bos, "ids": [pair.ours.tokenizer.bos_token_id], "tokens": [bos]}}
        changed["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": known,
        }
    else:
        changed["add_bos_token"] = True
    (tmp_path / says_so).write_text(json.dumps(changed))
    ours = hf.AutoTokenizer.from_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours("Once").input_ids == theirs("Once").input_ids
    assert len(ours("Once").input_ids) == (2 if says_so == "tokenizer.json" else 1)
    plain = ours("Once", add_special_tokens=False).input_ids
    assert plain == theirs("Once", add_special_tokens=False).input_ids


def test_padding_keeps_what_stands_beside_the_ids(pair):
    def script(lib):
        tokenizer = lib.tokenizer
        tokenizer.pad_token = tokenizer.eos_token
        many = tokenizer.pad({"input_ids": [[1, 2], [3]], "labels": [1, 0]})
        one = tokenizer.pad({"input_ids": [1, 2]}, padding="max_length", max_length=4)
        return dict(many), dict(one)

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_special_tokens_are_left_out_where_transformers_does(pair):
    def script(lib):
        tokenizer = lib.tokenizer
        cut = tokenizer("Once upon a time", truncation=True, max_length=0)["input_ids"]
        tokenizer.truncation_side = "left"
        left = tokenizer("Once upon a time", truncation=True, max_length=0)["input_ids"]
        tokenizer.pad_token = "!"
        ids = [5, tokenizer.pad_token_id, 6]
        return cut, left, tokenizer.decode(ids, skip_special_tokens=True)

    ours, theirs = pair.run(script)
    assert ours == theirs


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda t: t(7), "text"),
        (lambda t: t(["a", 7]), "text"),
        (lambda t: t("a", "b"), "text_pair"),
        (lambda t: t("a", padding="wide"), "padding"),
        (lambda t: t("a", truncation="only_second"), "truncation"),
        (lambda t: t("a", return_tensors="tf"), "return_tensors"),
        (lambda t: t(["a", "one more"], return_tensors="np"), "input_ids"),
        (lambda t: t("a", return_offsets_mapping=True), "return_offsets_mapping"),
        (lambda t: t("a", is_split_into_words=True), "is_split_into_words"),
        (lambda t: t("a", paddding=True), "paddding"),
        (lambda t: t("a", padding=True, padding_side="up"), "padding_side"),
        (lambda t: t.apply_chat_template([]), "apply_chat_template"),
        (lambda t: t.add_special_tokens({"role": "[X]"}), "special_tokens_dict"),
    ],
)
def test_what_the_tokenizer_does_not_do_is_refused_by_name(folder, call, name):
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, pad_token=END)
    with pytest.raises(GptxError, match=rf"^{name}\b"):
        call(tokenizer)


def test_padding_needs_a_pad_token(folder):
    with pytest.raises(ParameterError, match=r"padding: .*tokenizer\.eos_token"):
        hf.AutoTokenizer.from_pretrained(folder)(["a", "b"], padding=True)


@pytest.mark.parametrize("name", ["wrong", "padding_side"])
def test_from_pretrained_names_the_argument_that_is_wrong(folder, name):
    with pytest.raises(ParameterError, match=name):
        hf.AutoTokenizer.from_pretrained(folder, **{name: "x"})
