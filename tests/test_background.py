"""asyncio: streams that share steps, cancellation, errors, the thread that comes and goes."""

import asyncio
import threading
import time

import pytest

import gptx
from gptx.errors import ParameterError, UnsupportedError
from models import write_model

PARAMS = dict(temperature=0.9, max_new_tokens=60)
ENDLESS = dict(temperature=0.9, max_new_tokens=100_000, context="slide", ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("background") / "model.gptx"
    write_model(path, block_size=128)
    return gptx.load(path)


@pytest.fixture(autouse=True)
def nothing_is_left(model):
    yield
    deadline = time.monotonic() + 10
    while model._engine.stats()["requests"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert model._engine.stats()["requests"] == 0
    while any(t.name == "gptx" for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(t.name == "gptx" for t in threading.enumerate())


async def collect(stream):
    return "".join([piece async for piece in stream])


def test_streams_of_many_tasks_give_what_they_give_alone(model):
    async def main():
        streams = [model.astream(f"text {i}", seed=i, **PARAMS) for i in range(20)]
        return await asyncio.gather(*map(collect, streams))

    steps = model._engine.stats()["steps"]
    texts = asyncio.run(main())
    assert model._engine.stats()["steps"] - steps < 20 * 60 / 4  # they shared steps
    assert texts == [model.generate(f"text {i}", seed=i, **PARAMS).text for i in range(20)]


def test_agenerate_is_generate(model):
    async def main():
        one = await model.agenerate("abc", seed=1, **PARAMS)
        many = await model.agenerate(["abc", "d"], seed=1, n=2, **PARAMS)
        return one, many

    one, many = asyncio.run(main())
    assert one == model.generate("abc", seed=1, **PARAMS)
    expected = model.generate(["abc", "d"], seed=1, n=2, **PARAMS)
    assert [[c.text for c in r.choices] for r in many] == [
        [c.text for c in r.choices] for r in expected
    ]


def test_the_event_loop_goes_on_meanwhile(model):
    async def main():
        task = asyncio.create_task(model.agenerate("abc", **ENDLESS | dict(max_new_tokens=2000)))
        ticks = 0
        while not task.done():
            await asyncio.sleep(0.001)
            ticks += 1
        return ticks

    assert asyncio.run(main()) > 3


def test_leaving_the_loop_and_closing_cancel_the_rest(model):
    async def main():
        async for _ in model.astream("abc", seed=1, **ENDLESS):
            break
        stream = model.astream("abc", seed=1, **ENDLESS)
        await anext(stream)
        await stream.aclose()
        return stream.result

    result = asyncio.run(main())
    assert result.finish_reason == "cancelled"
    assert 0 < result.completion_tokens < 100_000


def test_nothing_comes_after_a_stream_was_closed(model):
    async def run():
        stream = model.astream("a", **ENDLESS)
        await anext(stream)
        await asyncio.sleep(0.05)  # for more pieces
        await stream.aclose()
        return [piece async for piece in stream]

    assert asyncio.run(run()) == []


def test_without_an_event_loop_nothing_is_started(model):
    with pytest.raises(UnsupportedError, match="event loop; elsewhere use stream"):
        model.astream("a")
    assert model._engine.stats()["requests"] == 0


def test_cancelling_a_task_cancels_its_requests(model):
    async def main():
        task = asyncio.create_task(model.agenerate(["abc"] * 4, **ENDLESS))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_errors_arrive_where_the_text_is_awaited(model, tmp_path):
    from models import random_tensors

    config = write_model(tmp_path / "m.gptx")
    tensors = random_tensors(config)
    tensors["ln_f.weight"][:] = 3e38
    write_model(tmp_path / "bad.gptx", tensors)
    bad = gptx.load(tmp_path / "bad.gptx")

    async def main():
        with pytest.raises(gptx.NonFiniteLogitsError):
            await bad.agenerate("abc")
        with pytest.raises(gptx.NonFiniteLogitsError):
            await collect(bad.astream("abc"))
        with pytest.raises(ParameterError):
            model.astream("abc", temperature=-1)
        with pytest.raises(ParameterError):
            model.astream("abc", n=2)

    asyncio.run(main())


def test_threads_and_tasks_share_a_model(model):
    expected = [model.generate(f"t{i}", seed=i, **PARAMS).text for i in range(8)]
    found = {}

    def work(i):
        found[i] = model.generate(f"t{i}", seed=i, **PARAMS).text

    async def main():
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        texts = await asyncio.gather(
            *(collect(model.astream(f"t{i}", seed=i, **PARAMS)) for i in range(4, 8))
        )
        for thread in threads:
            await asyncio.to_thread(thread.join)
        return texts

    texts = asyncio.run(main())
    assert [*(found[i] for i in range(4)), *texts] == expected


def test_a_loop_that_closes_early_leaves_nothing_running(model):
    async def main():
        stream = model.astream("abc", **ENDLESS)
        await anext(stream)
        return stream

    asyncio.run(main())


def test_the_interpreter_ends_while_texts_are_generated(tmp_path):
    import subprocess
    import sys

    write_model(tmp_path / "m.gptx", block_size=1024)
    code = (
        "import asyncio, sys, gptx\n"
        "model = gptx.load(sys.argv[1])\n"
        "async def main():\n"
        "    global stream\n"
        "    stream = model.astream('abc', max_new_tokens=1000)\n"
        "    await anext(stream)\n"
        "asyncio.run(main())\n"
        "print('end')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.gptx")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "end\n", "")
