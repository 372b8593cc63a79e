"""Where a measurement was made: processor, memory, versions and commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import numpy as np

from gptx import _core

_FLAGS = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)


def describe_machine() -> dict[str, object]:
    """Plain values for the JSON; what the system does not tell is None."""
    processor = _processor()
    flags = (processor.get("flags") or processor.get("Features") or "").split()
    return {
        "cpu": processor.get("model name") or platform.processor() or platform.machine(),
        "cpu_flags": [flag for flag in _FLAGS if flag in flags],
        "cpus": os.cpu_count(),
        "usable_cpus": _core.usable_cpus(),
        "isas": _core.usable_isas(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": list(os.getloadavg()),
    }


def describe_versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "gptx": _core.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """The commit of the checkout, with "+" where files differ from it, or "unknown"."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def environment_for(threads: int) -> dict[str, str]:
    """The environment of a peer's process: its libraries use as many threads, and no network."""
    count = str(threads)
    return {
        **os.environ,
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def process_memory() -> dict[str, int] | None:
    """Bytes of this process now, and the most it has had resident; None where unknown.

    ``anonymous`` is what it allocated, ``file`` what it maps of files: the page cache's own pages,
    which every process that maps the file shares.
    """
    fields = _key_values(Path("/proc/self/status"))
    names = {"anonymous": "RssAnon", "file": "RssFile", "peak": "VmHWM"}
    if not all(field in fields for field in names.values()):
        return None
    return {name: int(fields[field].split()[0]) * 1024 for name, field in names.items()}


def _git(*arguments: str) -> str:
    root = Path(__file__).parent
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> dict[str, str]:
    return _key_values(Path("/proc/cpuinfo"))


def _key_values(path: Path) -> dict[str, str]:
    """Lines "key : value"; of keys that repeat, the first."""
    fields: dict[str, str] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    return fields
