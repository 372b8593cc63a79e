"""gptx on a GPU, in one command: built, tested, checked, timed, and torch beside it.

    python bench/gpu.py                                        everything, in nine minutes
    python bench/gpu.py --parts build,test,check --minutes 5
    python bench/gpu.py --parts decode,prefill --models gpt2 --precisions bfloat16
    python bench/gpu.py --parts peers --json peers.json
    python bench/gpu.py --from-json build/gpu/gpu.json         show a run again

Weights are random and nothing is downloaded. Every part runs in a process of its own with a time
limit, and its records are appended to a file of JSON lines at once; one that fails or is stopped is
named in the tables, which come last. How the figures are made is in bench/README.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_bench import build, driver, processes, table

PARTS = ("build", "test", "check", "micro", "decode", "prefill", "end_to_end", "peers")
MODELS = ("gpt2", "gpt2-xl")
PRECISIONS = ("bfloat16", "int8")
PEERS = {
    "bfloat16": ("torch eager", "torch graph", "torch compiled"),
    "int8": ("torch int8",),
}

_SECONDS = {  # the most that one process of each part may take
    **{"machine": 60, "yardsticks": 60, "weights": 120, "build": 400, "test": 240, "tiny": 90},
    **{"check": 120, "micro": 60, "decode": 90, "prefill": 45, "end_to_end": 60, "peers": 150},
}
_LEAST_SECONDS = 5  # with less than this left nothing is begun


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    if options.from_json:
        print(table.render(json.loads(options.from_json.read_text())))
        return 0
    try:
        capability = driver.compute_capability()
    except driver.NoGpuError as error:
        print(f"gpu.py: nothing to measure: {error}", file=sys.stderr)
        return 1
    run = Run(options, capability)
    run.everything()
    report = run.report()
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table.render(report))
    return 1 if run.failed else 0


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def some_of(known: tuple[str, ...]) -> Any:
        def names(text: str) -> list[str]:
            chosen = [name for name in text.split(",") if name]
            for name in chosen:
                if name not in known:
                    expected = ", ".join(known)
                    raise argparse.ArgumentTypeError(f"expected some of {expected}, got {name!r}")
            return [name for name in known if name in chosen]

        return names

    for name, known in (("parts", PARTS), ("models", MODELS), ("precisions", PRECISIONS)):
        every = ",".join(known)
        parser.add_argument(
            f"--{name}",
            type=some_of(known),
            default=every,
            metavar="NAME,...",
            help="default: %(default)s",
        )
    parser.add_argument("--minutes", type=float, default=9, help="for everything; %(default)s")
    default = build.FOLDER / "gpu.json"
    parser.add_argument("--json", type=Path, default=default, metavar="FILE", help="%(default)s")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="show this, measure nothing")
    return parser.parse_args(argv)


class Run:
    """One run: what is left of its time, and where its records go."""

    def __init__(self, options: argparse.Namespace, capability: int) -> None:
        self.failed = False
        self._options = options
        self._capability = capability
        self._start = time.monotonic()
        self._records = options.json.with_suffix(".jsonl")
        self._records.parent.mkdir(parents=True, exist_ok=True)
        self._records.write_text("")
        self._site: Path | None = None

    def report(self) -> dict[str, Any]:
        """Everything the JSON holds."""
        options = self._options
        return {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "settings": {
                **{"parts": options.parts, "models": options.models},
                **{"precisions": options.precisions, "minutes": options.minutes},
            },
            "capability": self._capability,
            "records": self._read(),
        }

    def everything(self) -> None:
        parts = self._options.parts
        if not self._find_gptx(may_build="build" in parts):
            return
        measured = [part for part in parts if part not in ("build", "test", "check", "micro")]
        self._part({"part": "machine"})
        if measured:
            self._part({"part": "yardsticks"})
        if "test" in parts:
            self._test()
            self._sanitize("memcheck")
        for task in self._tasks():
            if task["part"] == "micro" and build.nvcc() is None:
                self._note(task, "skipped", detail="there is no nvcc")
            else:
                self._part(task)
        if measured:
            self._part({"part": "yardsticks"})  # again: a card that is hot is slower
        if "test" in parts:
            self._sanitize("racecheck")  # slow, and least likely to find something

    def _tasks(self) -> Iterator[dict[str, Any]]:
        """What runs in processes of its own, weights before those who need them."""
        parts, precisions = self._options.parts, self._options.precisions
        written = set()

        def weights(model: str, precision: str) -> Iterator[dict[str, Any]]:
            if (model, precision) not in written:
                written.add((model, precision))
                yield {"part": "weights", "model": model, "precision": precision}

        for part in parts:
            if part == "micro":
                yield {"part": part}
            for model in self._options.models:
                chosen = ["float32", *precisions] if part == "check" else precisions
                for precision in chosen if part not in ("build", "test", "micro") else ():
                    yield from weights(model, precision)
                    for by in self._by(part, precision):
                        yield {"part": part, "model": model, "precision": precision, "by": by}

    def _by(self, part: str, precision: str) -> tuple[str, ...]:
        """Who runs a part: one after another, each in a process of its own."""
        if part == "peers":
            return PEERS[precision]
        both = part == "prefill" and self._capability == 90  # wgmma, and mma.sync as elsewhere
        return ("gptx", "gptx by warps") if both else ("gptx",)

    def _find_gptx(self, *, may_build: bool) -> bool:
        """Whether there is a gptx that can use the GPU: installed, or built here."""
        installed = build.reason_unusable(None)
        if not installed:
            self._note({"part": "build"}, "done", detail="gptx is installed with CUDA")
            return True
        self._site = build.SITE
        seconds = 0.0
        if may_build:
            folder = build.FOLDER / "cmake"
            for step, command in enumerate(build.commands(folder, self._capability)):
                done = self._run(command, f"build-{step}", _SECONDS["build"])
                seconds += done.seconds
                if done.status != 0:
                    self._note({"part": "build"}, "failed", seconds, done.reason)
                    return False
            build.link_site(self._site, folder)
        reason = build.reason_unusable(self._site)
        if reason:
            hint = "" if may_build else "; add build to --parts"
            self._note({"part": "build"}, "failed", seconds, f"{reason}{hint}")
            return False
        self._note({"part": "build"}, "done", seconds)
        return True

    def _test(self) -> None:
        if not self._has_time({"part": "test"}):
            return
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/cuda"]
        done = self._run(command, "test", _SECONDS["test"])
        counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)\b", done.output)
        first = re.search(r"^(?:FAILED|ERROR) .*", done.output, re.MULTILINE)
        detail = ", ".join(counts[-4:]) or done.reason
        if first:
            detail += f"; {first[0]}"
        passed = done.status == 0 and any(count.endswith("passed") for count in counts)
        self._note({"part": "test"}, "passed" if passed else "failed", done.seconds, detail)

    def _sanitize(self, tool: str) -> None:
        """A tiny model watched by a tool of compute-sanitizer, where there is one."""
        about = {"part": "test", "by": tool}
        if not shutil.which("compute-sanitizer"):
            self._note(about, "skipped", detail="there is no compute-sanitizer")
        elif self._has_time(about):
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99"]
            done = self._run([*command, *self._command({"part": "tiny"})], tool, _SECONDS["tiny"])
            summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", done.output)
            detail = summary[-1] if summary else done.reason
            passed = done.status == 0 and bool(summary)
            self._note(about, "passed" if passed else "failed", done.seconds, detail)

    def _part(self, task: dict[str, Any]) -> None:
        if not self._has_time(task):
            return
        before = len(self._read())
        part = task["part"]
        name = "-".join(task.values()).replace(" ", "-")
        done = self._run(self._command(task), name, _SECONDS[part])
        records = self._read()[before:]
        wrong = [record["failed"] for record in records if "failed" in record]
        if done.status != 0:
            wrong.append(done.reason)
        good = "passed" if part == "check" else "done"
        self._note(task, "failed" if wrong else good, done.seconds, "; ".join(wrong))

    def _command(self, task: dict[str, Any]) -> list[str]:
        where = {"records": str(self._records.resolve()), "weights": str(build.FOLDER / "weights")}
        return [sys.executable, "-m", "gpu_bench.process", json.dumps(task | where)]

    def _run(self, command: list[str], name: str, limit: float) -> processes.Done:
        print(f"{self._left():4.0f} s left: {name}", file=sys.stderr, flush=True)
        log = build.FOLDER / "logs" / f"{name}.log"
        env = build.environment(self._site)
        limit = max(1.0, min(limit, self._left()))
        done = processes.run(command, log, limit=limit, env=env, cwd=build.ROOT)
        if done.status != 0:
            end = "\n".join(done.output.splitlines()[-15:])
            print(f"{name}: {done.reason}; the end of {log}:\n{end}", file=sys.stderr, flush=True)
        return done

    def _left(self) -> float:
        return self._options.minutes * 60 - (time.monotonic() - self._start)

    def _has_time(self, task: dict[str, Any]) -> bool:
        if self._left() >= _LEAST_SECONDS:
            return True
        self._note(task, "skipped", detail="no time was left")
        return False

    def _note(
        self, task: dict[str, Any], status: str, seconds: float | None = None, detail: str = ""
    ) -> None:
        self.failed |= status == "failed"
        taken = {} if seconds is None else {"seconds_taken": seconds}
        record = task | {"status": status, "detail": detail} | taken
        with self._records.open("a") as out:
            out.write(json.dumps(record) + "\n")

    def _read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._records.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
