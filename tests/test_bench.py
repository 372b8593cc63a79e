"""The benchmark runs, checks before it times, and says what it left out."""

import json
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).parent.parent / "bench" / "run.py"


def bench(*arguments):
    return subprocess.run(
        [sys.executable, str(RUN), "--shape", "tiny", "--quick", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_table_and_every_sample_are_written(tmp_path):
    result = bench("--json", tmp_path / "out.json", "--peers", "transformers,llama.cpp")
    assert result.returncode == 0, result.stderr
    for row in ("prefill", "share of the FMA peak", "decode, batch 1", "share of the read", "load"):
        assert row in result.stdout
    assert "llama.cpp" in result.stdout.split("Skipped:")[1]
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["peers"]["gptx"]
    assert report["peers"]["llama.cpp"]["skipped"]


def test_an_unknown_peer_is_refused_by_name():
    result = bench("--peers", "nobody")
    assert result.returncode == 2
    assert "nobody" in result.stderr
