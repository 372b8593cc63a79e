"""Commands with a time limit, whose output goes to a log."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Done(NamedTuple):
    """How a command ended.

    Attributes:
        status: its exit status; None where its time was up.
        seconds: how long it ran.
        output: the log, standard output and errors together.
    """

    status: int | None
    seconds: float
    output: str

    @property
    def reason(self) -> str:
        """Why it failed, in one line."""
        if self.status is None:
            return f"stopped after {self.seconds:.0f} s"
        lines = [line for line in self.output.splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"exit status {self.status}"


def run(
    command: Sequence[str], log: Path, *, limit: float, env: Mapping[str, str], cwd: Path
) -> Done:
    """Runs a command; at its limit it is killed with everything it has started."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=cwd, start_new_session=True
        )
        status: int | None = None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also where Ctrl-C ends the wait
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Done(status, time.perf_counter() - start, log.read_text(errors="replace"))
