"""The library as a guest in a process: signals, forks, memory, the floating-point environment."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import gptx
from models import write_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.gptx"
    write_model(path, n_layer=8, n_embd=512, n_head=8, block_size=2048)
    return path


@pytest.fixture(scope="module")
def model(path):
    return gptx.load(path)


def interrupt_after(seconds):
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


LONG = [i % 257 for i in range(2000)]


@pytest.mark.parametrize("work", ["prefill", "decode", "logits"])
def test_ctrl_c_is_quick_and_the_model_goes_on(model, work):
    long_work = {
        "prefill": lambda model: model.generate([LONG] * 50, max_new_tokens=1),
        "decode": lambda model: model.generate("a", max_new_tokens=2000, ignore_eos=True),
        "logits": lambda model: [model.logits(LONG) for _ in range(100)],
    }
    expected = model.generate("after", temperature=0, max_new_tokens=20).token_ids
    late = []
    for attempt in range(6):
        timer = interrupt_after(0.03 + 0.02 * attempt)
        sent = time.perf_counter() + 0.03 + 0.02 * attempt
        with pytest.raises(KeyboardInterrupt):
            long_work[work](model)
        late.append(time.perf_counter() - sent)
        timer.join()
        assert model.generate("after", temperature=0, max_new_tokens=20).token_ids == expected
    assert sorted(late)[len(late) // 2] < 0.1


def test_a_forked_child_generates_the_same_and_so_does_its_parent(model):
    expected = model.generate("fork", temperature=0, max_new_tokens=20).token_ids
    child = os.fork()
    if child == 0:
        same = model.generate("fork", temperature=0, max_new_tokens=20).token_ids == expected
        os._exit(0 if same else 1)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
    assert model.generate("fork", temperature=0, max_new_tokens=20).token_ids == expected


def status_kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "int8"), ("int8", "int8-fast")],
)
def test_weights_are_used_in_the_file_and_not_copied(tmp_path, dtype, precision):
    path = tmp_path / "wide.gptx"
    write_model(path, dtype=dtype, n_layer=8, n_embd=768, n_head=12)
    copied_kib = path.stat().st_size // 1024
    assert copied_kib > 50_000
    before = status_kib("RssAnon")
    model = gptx.load(path, precision=precision)
    model.generate("warm", max_new_tokens=2)
    assert status_kib("RssAnon") - before < 40_000
    del model


def test_more_threads_than_processors_and_two_models_at_once_do_not_collapse(path):
    """Waiting threads give their processor away: what spins takes a hundred times as long here."""
    crowd = 4 * os.cpu_count()

    def seconds(models):
        workers = [
            threading.Thread(target=m.generate, args=("a",), kwargs=dict(max_new_tokens=8))
            for m in models
        ]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - start

    alone = min(seconds([gptx.load(path)]) for _ in range(3))
    models = [gptx.load(path, threads=crowd) for _ in range(2)]
    assert min(seconds(models) for _ in range(3)) < 20 * alone


def test_an_idle_model_uses_no_processor(model):
    model.generate("warm", max_new_tokens=2)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.02


def test_the_callers_rounding_and_subnormals_are_left_alone(model):
    tiny = np.float32(1e-40)
    model.generate("x", max_new_tokens=2)
    assert tiny * np.float32(0.5) > 0


def test_the_interpreter_exits_while_a_stream_is_open(path):
    code = f"""
        import gptx
        model = gptx.load({str(path)!r})
        stream = model.stream("a", max_new_tokens=100, ignore_eos=True)
        next(stream)
        print("open")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert result.stdout == "open\n"
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("work", ["generate", "stream", "guided", "logits"])
def test_the_interpreter_exits_while_daemon_threads_compute(path, work):
    code = f"""
        import threading, time
        import gptx
        model = gptx.load({str(path)!r})

        def generate():
            model.generate("a", max_new_tokens=100_000, context="slide", ignore_eos=True)

        def stream():
            for _ in model.stream("a", max_new_tokens=100_000, context="slide", ignore_eos=True):
                pass

        def guided():
            model.generate("a", max_new_tokens=100_000, context="slide", ignore_eos=True,
                           logits_processors=[lambda ids, logits: logits])

        def logits():
            while True:
                model.logits("a" * 60)

        for _ in range(3):
            threading.Thread(target={work}, daemon=True).start()
        time.sleep(0.3)
        print("end")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "end\n", "")


def test_generation_needs_neither_torch_nor_network(path):
    code = f"""
        import sys
        opened = []
        sys.addaudithook(lambda e, a: opened.append(e) if e.startswith("socket.") else None)
        import gptx
        gptx.generate("Once", model={str(path)!r}, max_new_tokens=3)
        gptx.generate("Once", max_new_tokens=3)
        assert not opened, opened
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)
