"""Generation in the background, for asyncio: ``async for piece in model.astream(...)``.

One thread for each model drives its jobs together while there are any; then it ends.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Sequence

from gptx import _core, jobs
from gptx.errors import UnsupportedError
from gptx.generation import Generation


class Background:
    """Drives jobs of one engine on a thread of its own; any thread may add and cancel them."""

    def __init__(self, engine: _core.Engine) -> None:
        self._engine = engine
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._watchers: dict[jobs.Job, Callable[[BaseException | None], None]] = {}
        self._cancelled: set[jobs.Job] = set()
        self._thread: threading.Thread | None = None
        _living.add(self)

    def add(self, job: jobs.Job, watcher: Callable[[BaseException | None], None]) -> None:
        """Drives a job to its end.

        ``watcher`` is called on the background thread after each step that changed the job, with an
        error where the engine failed.
        """
        with self._lock:
            if self._process != os.getpid():  # the thread stayed in the parent
                self._process, self._thread = os.getpid(), None
            self._watchers[job] = watcher
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="gptx", daemon=True)
                self._thread.start()

    def cancel(self, job: jobs.Job) -> None:
        """Ends a job where it is, within a step."""
        with self._lock:
            if job in self._watchers:
                self._cancelled.add(job)

    def stop(self) -> None:
        """Cancels everything and waits for the thread."""
        with self._lock:
            self._cancelled |= set(self._watchers)
            thread = self._thread
        if thread is not None and self._process == os.getpid():
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                for job in self._cancelled:
                    job.cancel()
                self._cancelled.clear()
                watchers = dict(self._watchers)
                if not watchers:
                    self._thread = None
                    return
            error: BaseException | None = None
            running = [job for job in watchers if not job.finished]
            try:
                if running:
                    jobs.step(self._engine, running)
            except BaseException as caught:
                error = caught
                for job in running:
                    job.cancel()
            for job, watcher in watchers.items():
                if job.finished:
                    job.close()
                    with self._lock:
                        del self._watchers[job]
                watcher(error)


def check_loop() -> None:
    """Raises UnsupportedError where no event loop runs."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise UnsupportedError(
            "astream: needs a running event loop; elsewhere use stream"
        ) from None


class AsyncStream(AsyncIterator[str]):
    """The pieces of a text as they are generated; made by `Model.astream`.

    Leaving the loop, `aclose`, or cancelling the task cancels the rest.
    """

    def __init__(self, background: Background, job: jobs.Job) -> None:
        self._background = background
        self._job = job
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None
        self._closed = False
        loop = asyncio.get_running_loop()

        def wake(stream: weakref.ref[AsyncStream], error: BaseException | None) -> None:
            if (alive := stream()) is not None:
                alive._failure = alive._failure or error
                alive._changed.set()

        weak = weakref.ref(self)

        def watcher(error: BaseException | None) -> None:
            try:
                loop.call_soon_threadsafe(wake, weak, error)
            except RuntimeError:  # the loop is closed: nobody waits any more
                background.cancel(job)

        background.add(job, watcher)

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> str:
        try:
            while not self._closed:
                self._changed.clear()
                finished = self._job.finished
                if piece := self._job.pieces():
                    return piece
                if self._failure is not None or self._job.error is not None:
                    raise self._failure or self._job.error  # type: ignore[misc]
                if finished:
                    break
                await self._changed.wait()
        except asyncio.CancelledError:
            self._background.cancel(self._job)
            raise
        raise StopAsyncIteration

    def __del__(self) -> None:
        self._background.cancel(self._job)

    async def aclose(self) -> None:
        """Cancels what has not been generated yet."""
        self._closed = True
        self._background.cancel(self._job)
        while not self._job.finished:
            self._changed.clear()
            await self._changed.wait()

    @property
    def result(self) -> Generation:
        """The text so far; complete once the loop has ended."""
        return self._job.generation()


async def finish(background: Background, started: Sequence[jobs.Job]) -> list[Generation]:
    """Drives jobs to their ends; cancelling the task cancels them."""
    streams = [AsyncStream(background, job) for job in started]
    try:
        for stream in streams:
            while not stream._job.finished and stream._failure is None:
                stream._changed.clear()
                if not stream._job.finished:
                    await stream._changed.wait()
            if stream._failure is not None:
                raise stream._failure
    except BaseException:
        for job in started:
            background.cancel(job)
        raise
    return [job.generation() for job in started]


_living: weakref.WeakSet[Background] = weakref.WeakSet()


def _stop_all() -> None:
    # A thread inside the core must not outlive the interpreter.
    for background in list(_living):
        background.stop()


atexit.register(_stop_all)
