"""The CUDA backend: whether it is there, and if not, why.

Nothing here is called before somebody asks for a CUDA device; importing it touches neither library
nor driver.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gptx import _core
from gptx.errors import DeviceError


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        name: as its maker calls it.
        capability: its compute capability, 90 for 9.0.
        multiprocessors: how many it has.
        usable: whether this build has code for it.
        total_bytes, free_bytes: its memory.
    """

    name: str
    capability: int
    multiprocessors: int
    usable: bool
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Status:
    """What `status` found.

    Attributes:
        usable: whether ``device="cuda"`` can work.
        reason: why not; empty where it can.
        build: what this gptx was built with or without.
        driver_version, runtime_version: 13000 is CUDA 13.0; 0 is none.
        devices: the GPUs that the driver shows.
    """

    usable: bool
    reason: str
    build: str
    driver_version: int = 0
    runtime_version: int = 0
    devices: tuple[Device, ...] = ()


def library_path() -> Path:
    """Where libgptx_cuda is: the environment's GPTX_CUDA_LIB, else beside the extension module."""
    chosen = os.environ.get("GPTX_CUDA_LIB")
    return Path(chosen or Path(_core.__file__).parent / "_lib" / "libgptx_cuda.so")


def status() -> Status:
    """Looks for the library, the driver and the devices. It initializes the driver, which a process
    that forks afterwards must not use again."""
    build = _core.cuda_build
    try:
        found = _core.cuda_status(str(library_path()))
    except DeviceError as error:
        return Status(usable=False, reason=str(error), build=build)
    devices = tuple(Device(**device) for device in found["devices"])
    reason = str(found["message"])
    if found["usable"] and not any(device.usable for device in devices):
        reason = f"no device has code in this build, which is for {found['architectures']}"
    return Status(
        usable=not reason,
        reason=reason,
        build=build,
        driver_version=found["driver_version"],
        runtime_version=found["runtime_version"],
        devices=devices,
    )
