"""gptx with its CUDA library, out of this checkout, without installing anything.

The extension and the library are built in ``build/gpu/cmake``; ``build/gpu/site/gptx`` links to
them and to the Python files, so that a path is all it takes to import them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "gpu"
SITE = FOLDER / "site"
_BENCH = ROOT / "bench"
_PROBE = "from gptx import cuda; print(cuda.status().reason or 'usable')"


def environment(site: Path | None) -> dict[str, str]:
    """The environment of the parts: gptx from ``site`` if given, and every cache below build/."""
    paths = [str(_BENCH), os.environ.get("PYTHONPATH", "")]
    if site is not None:
        paths.insert(0, str(site))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(FOLDER / "inductor"),
        "TRITON_CACHE_DIR": str(FOLDER / "triton"),
        "HF_HUB_OFFLINE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # some warn, and warnings are errors
    }


def reason_unusable(site: Path | None) -> str:
    """Why gptx has no GPU in this environment, or "" where it has one."""
    done = subprocess.run(
        [sys.executable, "-c", _PROBE],
        env=environment(site),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode == 0 and done.stdout.strip() == "usable":
        return ""
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


def commands(folder: Path, capability: int) -> Iterator[list[str]]:
    """What configures and builds both in ``folder``, for one kind of GPU."""
    yield [
        *("cmake", f"-S{ROOT}", f"-B{folder}", "-DCMAKE_BUILD_TYPE=Release"),
        *(["-GNinja"] if shutil.which("ninja") else []),
        *("-DGPTX_CUDA=ON", f"-DGPTX_CUDA_ARCHS={capability}"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={_pybind11_folder()}",
    ]
    parallel = ("--parallel", str(os.cpu_count() or 1))
    yield ["cmake", "--build", str(folder), *parallel, "--target", "_core", "gptx_cuda"]


def nvcc() -> str | None:
    """The CUDA compiler, where cmake/cuda.cmake looks for it too."""
    folders = [os.environ.get(name, "") for name in ("CUDA_PATH", "CUDA_HOME")] + [
        "/usr/local/cuda"
    ]
    places = [os.environ.get("PATH", ""), *(f"{folder}/bin" for folder in folders if folder)]
    return os.environ.get("CUDACXX") or shutil.which("nvcc", path=os.pathsep.join(places))


def compile_micro(program: Path, capability: int) -> None:
    """Makes micro.cu a program. Raises RuntimeError with what the compiler said."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("there is no nvcc")
    options = ("-std=c++20", "-O3", f"-arch=sm_{capability}", "-Werror=all-warnings")
    source = str(Path(__file__).with_name("micro.cu"))
    command = [compiler, *options, f"-I{ROOT / 'csrc'}", "-o", str(program), source]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)


def link_site(site: Path, built: Path) -> None:
    """Makes ``site/gptx``: the Python files of the checkout and what was built beside them."""
    package = site / "gptx"
    if package.exists():
        shutil.rmtree(package)
    (package / "_lib").mkdir(parents=True)
    for source in (ROOT / "python" / "gptx").iterdir():
        if source.suffix != ".so" and source.name != "_lib":  # another build's
            (package / source.name).symlink_to(source)
    for extension in built.glob("_core*.so"):
        (package / extension.name).symlink_to(extension)
    (package / "_lib" / "libgptx_cuda.so").symlink_to(built / "libgptx_cuda.so")


def _pybind11_folder() -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True
    )
    return done.stdout.strip()
