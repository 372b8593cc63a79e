import io
import subprocess
import sys

import pytest
import torch

from gptx import cli
from gptx.errors import MissingExtraError, ParameterError
from gptx.training import cli as training_cli
from gptx.training.optim import choose_device, choose_precision, lr_factor
from gptx.training.options import TrainOptions
from gptx.training.progress import Progress, clock

SHAPE = ["--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=16", "--vocab-size=300"]
SHORT = ["--batch-size=2", "--steps=2", "--warmup=0", "--threads=1"]


def test_the_command_trains_and_resumes(corpus, tmp_path, capsys):
    out = str(tmp_path / "model")
    data = ["--data", *map(str, corpus), "--mix", "1,2"]
    assert cli.main(["train", *data, "--out", out, *SHAPE, *SHORT]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step 2" in captured.err
    assert (tmp_path / "model" / "model.gptx").exists()
    assert cli.main(["train", "--out", out, "--resume", "--steps", "3"]) == 0
    assert "resumes after step 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "data: expected at least one text file"),
        (["--out", "x", "--data", "no.txt"], "no.txt"),
        (["--out", "x", "--data", "a", "--mix", "1;2"], "mix: expected numbers"),
        (["--out", "x", "--data", "a", "--steps", "-5"], "steps: expected an integer"),
        (["--out", "no", "--resume"], "checkpoint.pt"),
    ],
    ids=str,
)
def test_a_wrong_call_is_one_line_that_names_the_option(arguments, message, capsys, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert cli.main(["train", *arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["torch", "tokenizers"])
def test_a_missing_package_is_named_with_its_extra(package, monkeypatch, tmp_path, corpus):
    monkeypatch.setitem(sys.modules, package, None)
    arguments = ["train", "--data", str(corpus[0]), "--out", str(tmp_path / "x")]
    options = cli._parser("train").parse_args(arguments)
    with pytest.raises(MissingExtraError) as caught:
        training_cli.run(options)
    assert caught.value.package == package
    assert caught.value.extra == "train"


def test_help_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['tokenizers'] = None\n"
        "from gptx import cli\n"
        "cli.main(['train', '--help'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--grad-accum" in result.stdout


def test_options_survive_their_storage():
    options = TrainOptions(data=("a", "b"), out="o", mix=(1.0, 2.0), minutes=3.5)
    stored = {k: list(v) if isinstance(v, tuple) else v for k, v in options.to_dict().items()}
    assert TrainOptions.from_dict(stored) == options
    with pytest.raises(ParameterError, match="colour"):
        TrainOptions.from_dict(stored | {"colour": 1})


def test_the_learning_rate_rises_then_falls_to_its_floor():
    options = TrainOptions(data=("a",), out="o", warmup=10, lr=1e-2, min_lr=1e-3)
    assert lr_factor(0, 0.0, options) == pytest.approx(0.1)
    assert lr_factor(9, 0.0, options) == pytest.approx(1.0)
    assert lr_factor(500, 0.5, options) == pytest.approx(0.55)
    assert lr_factor(1000, 1.0, options) == pytest.approx(0.1)


def test_an_unknown_device_is_named():
    with pytest.raises(Exception, match="device: torch cannot use 'abacus'"):
        choose_device("abacus")


def test_a_precision_that_is_asked_for_is_taken():
    cpu = torch.device("cpu")
    assert choose_precision("bfloat16", cpu) == "bfloat16"
    assert choose_precision("auto", cpu) in ("float32", "bfloat16")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_is_redrawn_on_a_terminal_and_taken_away():
    stream = Terminal()
    progress = Progress(stream)
    progress.bar(0.5, "half")
    progress.line("a line")
    assert "|##########..........| half" in stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[Ka line\n")


def test_without_a_terminal_there_are_plain_lines():
    stream = io.StringIO()
    progress = Progress(stream)
    for i in range(1000):
        progress.bar(i / 1000, f"step {i}")
    assert stream.getvalue() == "step 0\n"


def test_a_sample_cannot_command_the_terminal():
    stream = Terminal()
    Progress(stream).line("a\x1b[2Jb\nc\r")
    assert stream.getvalue() == "a\ufffd[2Jb\nc\ufffd\n"


def test_time_is_shown_as_a_clock():
    assert [clock(s) for s in (0, 59.6, 3723)] == ["0:00", "1:00", "1:02:03"]
