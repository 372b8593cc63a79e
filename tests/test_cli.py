"""The command: text on stdout, the rest on stderr, exit codes, no traceback for user errors."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import gptx
from models import write_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gptx"
    write_model(path)
    return path


def gptx_command(*arguments, stdin=None, env=None):
    return subprocess.run(
        [sys.executable, "-m", "gptx", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | (env or {}),
        stdin=subprocess.DEVNULL if stdin is None else None,
    )


def test_a_bare_prompt_is_continued_on_stdout():
    result = gptx_command("Once upon a time", "--seed", 1, "-n", 40)
    expected = gptx.generate("Once upon a time", seed=1, max_new_tokens=40)
    assert result.stdout == f"{expected}\n"
    assert result.returncode == 0
    assert result.stderr == ""


@pytest.mark.parametrize("prompt", ["床前明月光，", "你好，世界！"])
def test_chinese_prompts_stream_whole_characters_in_any_locale(prompt):
    result = gptx_command(prompt, "--seed", 3, env={"LC_ALL": "C", "PYTHONUTF8": "0"})
    assert result.stdout.startswith(prompt)
    assert "\ufffd" not in result.stdout
    assert len(result.stdout) > len(prompt) + 5


def test_the_precision_can_be_chosen_and_a_wrong_one_is_refused_by_name():
    chosen = gptx_command("Once", "--seed", 1, "-n", 8, "--precision", "int8-fast")
    expected = gptx.load(precision="int8-fast").generate("Once", seed=1, max_new_tokens=8)
    assert chosen.stdout == f"{expected}\n"
    refused = gptx_command("Once", "--precision", "int3")
    assert refused.returncode != 0
    assert "int8-fast" in refused.stderr
    assert "int3" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_prompt_may_come_from_stdin_and_the_result_as_json(path):
    result = gptx_command("-", "-m", path, "--json", "--seed", 2, stdin="Once")
    fields = json.loads(result.stdout)
    expected = gptx.generate("Once", model=path, seed=2)
    assert fields["text"] == expected.text
    assert fields["token_ids"] == list(expected.token_ids)
    assert fields["finish_reason"] == expected.finish_reason


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["x", "-t", "nan"], 1, "gptx: error: temperature: expected a number 0 to 100, got nan"),
        (["x", "--top-k", "-3"], 1, "top_k"),
        (["x", "-m", "nowhere.gptx"], 1, "nowhere.gptx"),
        ([""], 1, "prompt"),
        (["x", "--top-k", "many"], 2, "--top-k"),
        (["info", "nowhere.gptx"], 1, "nowhere.gptx"),
        (["verify", "nowhere.gptx"], 1, "nowhere.gptx"),
    ],
)
def test_an_error_is_one_line_and_a_code(arguments, code, message):
    result = gptx_command(*arguments)
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_input_that_is_no_utf_8_is_an_error_of_one_line(path):
    for command in ([], ["translate", "--to", "French"], ["classify", "--labels", "a,b"]):
        result = subprocess.run(
            [sys.executable, "-m", "gptx", *command, "-m", str(path)],
            input=b"\xff\xfe abc",
            capture_output=True,
        )
        assert result.returncode == 1
        assert result.stderr.startswith(b"gptx: error: standard input: expected a text in UTF-8")
        assert result.stderr.count(b"\n") == 1


def test_a_text_may_go_on_past_the_context(path):
    result = gptx_command("Once", "-m", path, "-n", 200, "--ignore-eos", "--json")
    assert json.loads(result.stdout)["finish_reason"] == "length"
    long = gptx_command(
        "x" * 300, "-m", path, "-n", 200, "--ignore-eos", "--context", "slide", "--json"
    )
    assert json.loads(long.stdout)["completion_tokens"] == 200


def test_info_and_verify_describe_a_file(path):
    info = gptx_command("info", path)
    assert info.returncode == 0
    assert "float32" in info.stdout
    assert isinstance(json.loads(gptx_command("info", path, "--json").stdout), dict)
    assert gptx_command("verify", path).returncode == 0


def test_a_flipped_bit_is_found_by_verify(path, tmp_path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    (tmp_path / "flipped.gptx").write_bytes(data)
    result = gptx_command("verify", tmp_path / "flipped.gptx")
    assert result.returncode == 1
    assert "wte.weight" in result.stderr


def test_info_without_a_file_says_what_gptx_runs_on():
    result = gptx_command("info")
    assert gptx.__version__ in result.stdout
    assert "scalar" in result.stdout


def test_version_and_help_are_quick_answers():
    assert gptx_command("--version").stdout.strip() == gptx.__version__
    assert "generate" in gptx_command("--help").stdout


def test_a_reader_that_goes_away_is_no_traceback(path):
    process = subprocess.Popen(
        [sys.executable, "-m", "gptx", "Once", "-n", "2000", "--ignore-eos", "-m", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        process.stdout.read(1)
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode in (0, 141)


def test_ctrl_c_keeps_the_text_so_far_and_exits_130():
    process = subprocess.Popen(
        [sys.executable, "-m", "gptx", "Once upon a time", "-n", "100000", "--ignore-eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"GPTX_CPU_ISA": "scalar"},
    )
    assert process.stdout.read(20).startswith(b"Once upon a time")
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in err
