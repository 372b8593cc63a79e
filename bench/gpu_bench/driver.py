"""The GPU as its driver shows it, before anything of gptx or torch can be imported."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_QUERIES = (
    *("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem"),
    *("clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu"),
)


class NoGpuError(Exception):
    """There is nothing to measure; the message says why."""


def compute_capability() -> int:
    """Of the first GPU, 90 for 9.0. Raises NoGpuError."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise NoGpuError("no NVIDIA driver: libcuda.so.1 was not found") from None
    status = driver.cuInit(0)
    if status != 0:
        raise NoGpuError(f"the NVIDIA driver shows no GPU: cuInit gives error {status}")
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        raise NoGpuError("the NVIDIA driver shows no GPU")
    driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    return 10 * major.value + minor.value


def describe() -> dict[str, str]:
    """What nvidia-smi tells of the first GPU; empty where there is no nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERIES)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return {}
    values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
    if done.returncode != 0 or len(values) != len(_QUERIES):
        return {}
    return dict(zip(_QUERIES, values, strict=True))
