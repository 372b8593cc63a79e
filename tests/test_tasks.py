"""Recipes: each is the prompt it says it is, cut only where it says so, and refuses by name."""

import json
import math

import numpy as np
import pytest

import gptx
from gptx import tasks
from gptx.errors import ContextLengthError, ParameterError
from models import write_model
from test_cli import gptx_command

TEXTS = ["She laughed and danced all day.", "The king wept at the grave of his only son."]
LABELS = ["sad", "happy", "wonderful"]


@pytest.fixture(scope="module")
def demo():
    return gptx.load()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A token for each byte, and room for 96."""
    path = tmp_path_factory.mktemp("tasks") / "m.gptx"
    write_model(path, block_size=96)
    return gptx.load(path)


# -- classify


@pytest.mark.parametrize("normalize", ["sum", "mean", "bytes"])
def test_the_scores_of_labels_are_those_of_choose(demo, normalize):
    for text, result in zip(
        TEXTS, tasks.classify(TEXTS, LABELS, model=demo, normalize=normalize), strict=True
    ):
        prompt, options = f"Text: {text}\nLabel:", [f" {label}" for label in LABELS]
        choice = demo.choose(prompt, options, normalize=normalize)
        assert np.array_equal(result.logits, choice.scores)
        assert result.label == str(result) == LABELS[choice.index]
        shares = np.exp(choice.scores) / np.exp(choice.scores).sum()
        assert np.allclose(list(result.probabilities.values()), shares)
        assert math.isclose(sum(result.probabilities.values()), 1)
        assert result.labels == (result.label,)


def test_one_text_is_one_result_and_a_list_is_a_list(demo):
    one = tasks.classify(TEXTS[0], LABELS, model=demo)
    many = tasks.classify(TEXTS, LABELS, model=demo)
    assert np.array_equal(one.logits, many[0].logits)
    assert len(many) == 2
    assert tasks.classify([], LABELS, model=demo) == []
    assert tasks.classify(TEXTS[0], LABELS).label == one.label


def test_calibration_takes_out_the_score_behind_a_neutral_text(demo):
    plain, neutral, other = tasks.classify([TEXTS[0], "N/A", "Hm."], LABELS, model=demo)
    calibrated = tasks.classify(TEXTS[0], LABELS, model=demo, calibrate=True)
    assert np.allclose(calibrated.logits, plain.logits - neutral.logits)
    calibrated = tasks.classify(TEXTS[0], LABELS, model=demo, calibrate="Hm.")
    assert np.allclose(calibrated.logits, plain.logits - other.logits)


def test_examples_and_wordings_stand_in_the_prompt(demo):
    result = tasks.classify(
        TEXTS[1],
        {"neg": "terrible", "pos": "great"},
        model=demo,
        template="Review: {text} It was {label}",
        examples=[("Fine work.", "pos"), ("A bore {label}.", "neg")],
    )
    prompt = (
        "Review: Fine work. It was great\n\nReview: A bore {label}. It was terrible\n\n"
        f"Review: {TEXTS[1]} It was"
    )
    choice = demo.choose(prompt, [" terrible", " great"])
    assert np.array_equal(result.logits, choice.scores)
    assert list(result.probabilities) == ["neg", "pos"]


def test_a_text_too_long_to_classify_loses_its_middle(small):
    text = "begin " + "x" * 200 + " end"
    result = tasks.classify(text, ["a", "b"], model=small)
    room = 96 - len("Text: ") - len("\nLabel:") - len(" a") - len(" ... ")
    ends = -(-room // 2), room // 2
    cut = f"{text[: ends[0]]} ... {text[-ends[1] :]}"
    choice = small.choose(f"Text: {cut}\nLabel:", [" a", " b"])
    assert np.array_equal(result.logits, choice.scores)
    with pytest.raises(ContextLengthError, match="shorter examples"):
        tasks.classify(text, ["a", "b"], model=small, examples=[("y" * 90, "a")])
    assert small._engine.stats()["requests"] == 0


def test_no_half_character_is_left_at_a_cut(small):
    for extra in range(4):
        text = "a" * extra + "床前明月光" * 30
        seen = tasks.summarize(text, model=small, detail=True, max_new_tokens=8, temperature=0)
        assert "\ufffd" not in seen.prompt
        assert " ... " in seen.prompt
        assert seen.prompt.endswith("\nTL;DR:")
        assert 80 <= seen.prompt_tokens <= 88


# -- what generates


def test_a_translation_is_the_line_behind_few_shots(demo):
    found = tasks.translate("Come\n home. ", to="German", model=demo, detail=True)
    assert found.prompt == (
        "English: Good morning.\nGerman: Guten Morgen.\n\n"
        "English: Where is the king?\nGerman: Wo ist der König?\n\n"
        "English: I like this house.\nGerman: Ich mag dieses Haus.\n\n"
        "English: Come home.\nGerman:"
    )
    expected = demo.generate(found.prompt, temperature=0, max_new_tokens=64, stop="\n")
    assert found.text == expected.text
    assert tasks.translate("Come home.", to="German", model=demo) == expected.text.strip()
    rare = tasks.translate("Come home.", to="Esperanto", model=demo, detail=True)
    assert rare.prompt == "English: Come home.\nEsperanto:"
    own = tasks.translate(
        "Come.", to="Latin", source="French", examples=[("Oui.", "Ita.")], model=demo, detail=True
    )
    assert own.prompt == "French: Oui.\nLatin: Ita.\n\nFrench: Come.\nLatin:"


def test_default_examples_leave_most_of_a_context_of_256(demo):
    for language in tasks._PHRASES:
        for source in tasks._PHRASES:
            seen = tasks.translate("x", to=language, source=source, model=demo, detail=True)
            assert seen.prompt_tokens <= 120
    assert tasks.answer("Who?", model=demo, detail=True).prompt_tokens <= 120


def test_an_answer_is_the_line_behind_the_question(demo):
    found = tasks.answer("Who is\nthe king?", model=demo, detail=True)
    assert found.prompt.startswith("Q: What is the capital of France?\nA: Paris\n\n")
    assert found.prompt.endswith("\n\nQ: Who is the king?\nA:")
    context = "The king is called Dummling."
    found = tasks.answer("Who?", context=context, model=demo, detail=True)
    assert found.prompt == f"{context}\n\nQ: Who?\nA:"
    assert found.completion_tokens <= 32
    expected = demo.generate(found.prompt, temperature=0, max_new_tokens=32, stop="\n")
    assert tasks.answer("Who?", context=context, model=demo) == expected.text.strip()


def test_a_summary_is_three_sentences_behind_the_text(demo):
    text = " ".join(TEXTS) + "\n"
    whole = tasks.summarize(text, model=demo, seed=3, detail=True)
    assert whole.prompt == text.rstrip() + "\nTL;DR:"
    again = demo.generate(
        whole.prompt, seed=3, max_new_tokens=100, top_k=2, temperature=1.0, top_p=1.0
    )
    assert whole.text == again.text
    short = tasks.summarize(text, model=demo, seed=3)
    assert whole.text.strip().startswith(short)
    assert tasks.summarize(text, model=demo, seed=3, sentences=None) == whole.text.strip()


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("One. Two! Three? Four.", "One. Two! Three?"),
        ('He said "No." Then 3.5 miles. And on. End.', 'He said "No." Then 3.5 miles. And on.'),
        ("一。二！三？四。", "一。二！三？"),
        ("only this", "only this"),
    ],
)
def test_sentences_end_at_their_marks(text, first):
    assert tasks._first(text, 3) == first


def test_a_list_gives_what_each_text_gives_alone(demo):
    for recipe, options in [
        (tasks.translate, {"to": "French"}),
        (tasks.answer, {}),
        (tasks.summarize, {"temperature": 0}),
    ]:
        together = recipe(TEXTS, model=demo, **options)
        assert together == [recipe(text, model=demo, **options) for text in TEXTS]
        assert recipe([], model=demo, **options) == []


def test_parameters_of_generation_pass_through(demo):
    sampled = tasks.answer("Who?", model=demo, temperature=1.2, seed=5, max_new_tokens=4, n=2)
    detail = tasks.answer(
        "Who?", model=demo, temperature=1.2, seed=5, max_new_tokens=4, n=2, detail=True
    )
    assert detail.text.strip() == sampled
    assert (detail.seed, len(detail.choices)) == (5, 2)


def test_a_small_context_gets_shorter_answers_not_an_error(small):
    assert tasks.answer("Who?", examples=[], model=small, detail=True).completion_tokens <= 48
    assert tasks.summarize("Long. " * 50, model=small, detail=True).prompt_tokens <= 48


def test_what_does_not_fit_is_refused_or_cut(small):
    with pytest.raises(ContextLengthError, match="shorten the text"):
        tasks.translate("x" * 60, to="Esperanto", model=small)
    with pytest.raises(ContextLengthError, match="fewer examples"):
        tasks.answer("Who?", model=small)
    found = tasks.answer("Who?", context="c" * 300, model=small, detail=True)
    assert " ... " in found.prompt
    assert found.prompt.endswith("\n\nQ: Who?\nA:")
    with pytest.raises(ContextLengthError, match="shorter question"):
        tasks.answer("w" * 80, context="c" * 300, model=small)


@pytest.mark.parametrize(
    ("call", "param"),
    [
        (lambda m: tasks.classify("", LABELS, model=m), "texts"),
        (lambda m: tasks.classify(5, LABELS, model=m), "texts"),
        (lambda m: tasks.classify("x", "ab", model=m), "labels"),
        (lambda m: tasks.classify("x", ["a"], model=m), "labels"),
        (lambda m: tasks.classify("x", ["a", "a"], model=m), "labels"),
        (lambda m: tasks.classify("x", ["a", ""], model=m), "labels"),
        (lambda m: tasks.classify("x", {"a": "same", "b": "same"}, model=m), "labels"),
        (lambda m: tasks.classify("x", LABELS, model=m, template="{text}"), "template"),
        (lambda m: tasks.classify("x", LABELS, model=m, template="{label}: {text}"), "template"),
        (lambda m: tasks.classify("x", LABELS, model=m, template="{text} {label}!"), "template"),
        (lambda m: tasks.classify("x", LABELS, model=m, examples=[("x", "no")]), "examples"),
        (lambda m: tasks.classify("x", LABELS, model=m, examples=["xy"]), "examples"),
        (lambda m: tasks.classify("x", LABELS, model=m, normalize="max"), "normalize"),
        (lambda m: tasks.classify("x", LABELS, model=m, calibrate=""), "calibrate"),
        (lambda m: tasks.classify("x", LABELS, model=5), "model"),
        (lambda m: tasks.translate("x", to="", model=m), "to"),
        (lambda m: tasks.translate("x", to="French", source="a\nb", model=m), "source"),
        (lambda m: tasks.translate(["x", " "], to="French", model=m), "text"),
        (lambda m: tasks.translate("x", to="French", examples=[("a",)], model=m), "examples"),
        (lambda m: tasks.translate("x", to="French", model=m, beams=2), "beams"),
        (lambda m: tasks.answer("", model=m), "question"),
        (lambda m: tasks.answer("x", context=" ", model=m), "context"),
        (lambda m: tasks.answer("x", max_new_tokens=256, model=m), "max_new_tokens"),
        (lambda m: tasks.summarize("x", sentences=0, model=m), "sentences"),
        (lambda m: tasks.summarize("x", temperature=-1, model=m), "temperature"),
    ],
)
def test_a_refusal_names_its_parameter(demo, call, param):
    with pytest.raises(ParameterError) as caught:
        call(demo)
    assert caught.value.param == param
    assert demo._engine.stats()["requests"] == 0


# -- the commands


def test_the_command_classifies_by_labels(demo):
    found = gptx_command("classify", "--labels", "sad,happy", *TEXTS, "--calibrate", "--json")
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    expected = tasks.classify(TEXTS, ["sad", "happy"], model=demo, calibrate=True)
    assert [line["label"] for line in lines] == [result.label for result in expected]
    assert [line["probabilities"] for line in lines] == [r.probabilities for r in expected]
    shown = gptx_command("classify", "--labels", "sad,happy", stdin=TEXTS[0] + "\n")
    assert shown.stdout.startswith(tasks.classify(TEXTS[0], ["sad", "happy"]).label + "\t")
    few = ("--example", "Fine.", "happy", "--template", "{text} I am {label}")
    assert gptx_command("classify", "--labels", "sad,happy", "x", *few).returncode == 0


def test_the_commands_give_what_the_recipes_give(demo):
    found = gptx_command("translate", "--to", "French", "Good night", "-n", 8)
    assert found.stdout == tasks.translate("Good night", to="French", max_new_tokens=8) + "\n"
    found = gptx_command("answer", "Who?", "--context", "The king laughed.")
    assert found.stdout == tasks.answer("Who?", context="The king laughed.") + "\n"
    found = gptx_command("summarize", "--seed", 2, "--sentences", 1, stdin=" ".join(TEXTS))
    assert found.stdout == tasks.summarize(" ".join(TEXTS), seed=2, sentences=1) + "\n"
    found = gptx_command("summarize", "-", "--seed", 2, "--json", stdin=" ".join(TEXTS))
    expected = tasks.summarize(" ".join(TEXTS), seed=2, detail=True)
    assert json.loads(found.stdout)["text"] == expected.text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["classify", "x"], 1, "gptx.tasks.classify"),
        (["classify", "x", "--calibrate"], 1, "calibrate: expected none without --labels"),
        (["classify", "--labels", "a", "x"], 1, "labels: expected at least two"),
        (["classify", "--labels", "a,b", "x", "--template", "no"], 1, "template"),
        (["translate", "x"], 2, "--to"),
        (["translate", "--to", "French", " "], 1, "text: expected"),
        (["answer", "x", "-n", "0"], 1, "max_new_tokens"),
        (["summarize", "x", "--sentences", "0"], 1, "sentences"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, code, message):
    found = gptx_command(*arguments)
    assert found.returncode == code
    assert message in found.stderr
    assert "Traceback" not in found.stderr
    assert found.stdout == ""
