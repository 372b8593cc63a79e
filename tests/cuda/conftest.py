"""Where the CUDA backend runs in the tests: on an emulator, and on a GPU where there is one."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from gptx import cuda

ROOT = Path(__file__).parents[2]


def build(folder, target, *options):
    """The folder in which CMake made a target, without Python and without nvcc."""
    for program in ("cmake", "c++"):
        if not shutil.which(program):
            pytest.skip(f"needs {program}")
    configure = ["cmake", f"-S{ROOT}", f"-B{folder}", "-DGPTX_EXTENSION=OFF"]
    configure += ["-DGPTX_NATIVE_TESTS=ON", "-DGPTX_CUDA=OFF", *options]
    make = ["cmake", "--build", str(folder), "--parallel", "2", "--target", target]
    for command in (configure, make):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory):
    """libgptx_cuda with kernels that run as fibers on this CPU."""
    if platform.machine() != "x86_64":
        pytest.skip("the emulator switches stacks on x86-64")
    folder = build(tmp_path_factory.mktemp("emulated"), "gptx_cuda_emulated", "-DGPTX_WERROR=ON")
    return str(folder / "tests" / "native" / "libgptx_cuda_emulated.so")


@pytest.fixture(scope="session")
def gpu_library():
    found = cuda.status()
    if not found.usable:
        pytest.skip(f"no GPU: {found.reason}")
    return str(cuda.library_path())


@pytest.fixture(scope="session", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def library(request):
    """The backend on the emulator, and on a GPU."""
    return request.getfixturevalue(f"{request.param}_library")
