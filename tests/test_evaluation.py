"""Figures of a text, and `gptx eval` without the lm-evaluation-harness."""

import json
import math
import subprocess
import sys

import pytest

import gptx
from gptx.errors import ParameterError
from gptx.evaluation import evaluate_tasks, evaluate_text
from models import write_model
from test_cli import gptx_command

TEXT = """\
Once upon a time there was a king.

She went into the wood and saw a wolf!

Too short here.

12 34 56 78 90

"Then all of them went home," he said
to the old woman in the house."""


@pytest.fixture(scope="module")
def demo():
    return gptx.load()


def test_bits_per_byte_are_the_log_probability_of_the_text(demo):
    figures = evaluate_text(demo, TEXT)
    scores = demo.logprobs(TEXT, bos=True)
    assert figures.tokens == len(scores.token_ids) - 1
    assert figures.bytes == len(TEXT.encode())
    assert math.isclose(figures.perplexity, scores.perplexity, rel_tol=1e-5)
    expected = -scores.total / math.log(2) / figures.bytes
    assert math.isclose(figures.bits_per_byte, expected, rel_tol=1e-5)


def test_last_words_are_those_that_greedy_decoding_would_write(demo):
    cases = [
        ("Once upon a time there was a", " king"),
        ("She went into the wood and saw a", " wolf"),
        ('"Then all of them went home," he said\nto the old woman in the', " house"),
    ]
    right = [
        demo.generate(context, temperature=0, max_new_tokens=4).text.startswith(word)
        for context, word in cases
    ]
    figures = evaluate_text(demo, TEXT)
    assert figures.last_words == 3
    assert math.isclose(figures.last_word_accuracy, sum(right) / 3)
    assert evaluate_text(demo, TEXT, limit=1).last_words == 1
    assert math.isnan(evaluate_text(demo, "No word to guess", limit=0).last_word_accuracy)


def test_a_paragraph_longer_than_the_context_is_cut_from_the_left(tmp_path):
    write_model(tmp_path / "m.gptx", block_size=32)
    model = gptx.load(tmp_path / "m.gptx")
    text = "one two three four five six seven eight nine"
    assert len(text) > 33
    assert evaluate_text(model, text).last_words == 1


def test_refusals_name_the_parameter(demo):
    for call, param in [
        (lambda: evaluate_text(demo, 5), "text"),
        (lambda: evaluate_text(demo, "Once upon", limit=-1), "limit"),
        (lambda: evaluate_text(demo, "Once upon", stride=0), "stride"),
    ]:
        with pytest.raises(ParameterError) as caught:
            call()
        assert caught.value.param == param


def test_tasks_without_the_harness_name_the_extra():
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "import gptx.evaluation\n"
        "try:\n    gptx.evaluation.evaluate_tasks(None, ['piqa'])\n"
        "except gptx.MissingExtraError as error:\n    print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "gptx[eval]"' in found.stdout, found.stderr


def test_tasks_are_checked_before_anything_runs(demo):
    pytest.importorskip("lm_eval")
    for arguments, options, param in [
        ("piqa", {}, "tasks"),
        ([], {}, "tasks"),
        (["piqa"], {"limit": 0}, "limit"),
        (["piqa"], {"num_fewshot": -1}, "num_fewshot"),
    ]:
        with pytest.raises(ParameterError) as caught:
            evaluate_tasks(demo, arguments, **options)
        assert caught.value.param == param


def test_the_command_prints_the_figures_of_a_file(tmp_path, demo):
    (tmp_path / "text.txt").write_text(TEXT)
    found = gptx_command("eval", "--builtin", "--data", tmp_path / "text.txt", "--json")
    assert json.loads(found.stdout) == evaluate_text(demo, TEXT)._asdict()
    shown = gptx_command("eval", "--builtin", "--data", tmp_path / "text.txt")
    assert "last_word_accuracy  " in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--builtin"], 1, "data: expected a text file"),
        (["--builtin", "--data", "nowhere.txt"], 1, "nowhere.txt"),
        (["--builtin", "--num-fewshot", 1], 1, "num_fewshot"),
        (["--tasks", "a", "--data", "x.txt"], 1, "data"),
        (["--tasks", "a", "--include-path", "nowhere"], 1, "include_path"),
        ([], 2, "--builtin"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, code, message):
    found = gptx_command("eval", *arguments)
    assert found.returncode == code
    assert message in found.stderr
    assert "Traceback" not in found.stderr
