"""How a model comes into a program: from a file, a checkpoint, or the package itself."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptx import modelfile
from gptx.errors import DeviceError, ParameterError
from gptx.generation import Generation
from gptx.model import Model, Prompt
from gptx.sampling import SamplingParams

_MAX_THREADS = 1024
_KV_CACHE_BYTES = 2 << 30
_PREFIX_CACHE_BYTES = 256 << 20
# A GPU needs more rows than a CPU before arithmetic is its bound, and is done with them sooner.
STEP_TOKENS = {"cpu": 512, "cuda": 2048}


def load(
    path: str | os.PathLike[str] | modelfile.ModelFile | None = None,
    *,
    device: str = "cpu",
    threads: int | None = None,
    isa: str | None = None,
    precision: str | None = None,
    kv_cache_dtype: str | None = None,
    kv_cache_bytes: int | None = None,
    prefix_cache_bytes: int = _PREFIX_CACHE_BYTES,
    step_tokens: int | None = None,
    verify: bool = True,
) -> Model:
    """Loads a model.

    Args:
        path: a ``.gptx`` file, whose weights are used where they lie in the page cache; or a
            checkpoint that `gptx-convert` reads, converted in memory; or a file that is open
            already; None is the built-in demo.
        device: "cpu"; "cuda", or "cuda:1" for another GPU than the first; or "auto", which is
            "cuda" where that works and else "cpu", with one warning in the log that says why.
        threads: 1 to 1024; default the environment's GPTX_NUM_THREADS, else the least of the CPUs
            the process may use, its cgroup quota and the physical cores.
        isa: kernels to use, such as "scalar" or "avx2"; default GPTX_CPU_ISA, else the best. A
            name that cannot run here is refused with those that can.
        precision: how products are computed; default what the weights are stored as:
            "float32" float32 by float32; bfloat16 and int8 weights can be expanded to it;
            "bfloat16" weights and activations in bfloat16, summed in float32;
            "int8" weights in int8, activations in int16: as exact as the weights;
            "int8-fast" activations in 8 bits too: faster prompts where the CPU multiplies bytes,
            less exact. It computes with the same int8 files.
        kv_cache_dtype: "float32", "bfloat16" or "int8", the last with a scale for each head and
            position; default float32 with the precision float32, else bfloat16.
        kv_cache_bytes: most memory for cached keys and values; default a quarter of the machine's,
            at most 2 GiB, or of what the GPU has free. One context always fits. The CPU takes it as
            it is needed, a GPU at once.
        prefix_cache_bytes: how much of it may keep the beginnings of texts that might come again,
            0 for none; the least recently used go first.
        step_tokens: tokens that are computed together at most, 8 to 4096; default 512 on the CPU
            and 2048 on a GPU. Longer prompts are computed in pieces, between which texts that are
            being generated go on.
        verify: check the checksum of every tensor.

    Raises:
        FileNotFoundError: there is no such file.
        ModelFileError: the file is damaged or not a model.
        ConvertError, UnsafeCheckpointError: the checkpoint does not make a GPT-2.
        ParameterError, UnsupportedError, DeviceError: an argument is not possible here.
    """
    if not isinstance(device, str) or not re.fullmatch(r"cpu|auto|cuda(:\d{1,3})?", device):
        raise ParameterError("device", device, "one of cpu, cuda, cuda:N, auto")
    count = _thread_count(threads)
    sizes = {"kv_cache_bytes": kv_cache_bytes, "prefix_cache_bytes": prefix_cache_bytes}
    for name, size in sizes.items():
        if size is not None and (type(size) is not int or size < 0):
            raise ParameterError(name, size, "a number of bytes")
    if device == "cpu" and kv_cache_bytes is not None and kv_cache_bytes > _memory():
        allowed = f"at most the memory of the machine, {_memory()} bytes"
        raise ParameterError("kv_cache_bytes", kv_cache_bytes, allowed)
    if step_tokens is not None and (type(step_tokens) is not int or not 8 <= step_tokens <= 4096):
        raise ParameterError("step_tokens", step_tokens, "an integer from 8 to 4096 or None")
    for name, value in (("precision", precision), ("kv_cache_dtype", kv_cache_dtype)):
        if value is not None and not isinstance(value, str):
            raise ParameterError(name, value, "a str or None")
    if device.startswith("cuda") and isa is not None:
        raise ParameterError("isa", isa, f"None with device={device!r}: it is of the CPU")
    if isinstance(path, modelfile.ModelFile):
        source = path
    else:
        if path is not None and not isinstance(path, str | os.PathLike):
            raise ParameterError("path", path, "a path, an open file of a model or None")
        source = _open(Path(demo_path() if path is None else path), verify=verify)
    options: dict[str, Any] = {
        "precision": precision or "",
        "kv_cache_dtype": kv_cache_dtype or "",
        "prefix_cache_bytes": prefix_cache_bytes,
    }
    if device != "cpu":
        name = "cuda:0" if device in ("auto", "cuda") else device
        try:
            return Model(
                source,
                device=name,
                threads=0,
                isa="",
                kv_cache_bytes=kv_cache_bytes,
                step_tokens=step_tokens or STEP_TOKENS["cuda"],
                **options,
            )
        except DeviceError as error:
            if device != "auto":
                raise
            _warn_once(f"device='auto' is the CPU here: {error}")
    return Model(
        source,
        device="cpu",
        threads=count,
        isa=os.environ.get("GPTX_CPU_ISA", "") if isa is None else isa,
        kv_cache_bytes=_cpu_kv_cache_bytes() if kv_cache_bytes is None else kv_cache_bytes,
        step_tokens=step_tokens or STEP_TOKENS["cpu"],
        **options,
    )


def generate(
    prompt: Prompt | Sequence[Prompt],
    params: SamplingParams | None = None,
    *,
    model: str | os.PathLike[str] | Model | None = None,
    **changes: object,
) -> Generation | list[Generation]:
    """`Model.generate` by a model that stays loaded: the built-in demo unless told otherwise.

    Args:
        prompt, params, **changes: as for `Model.generate`.
        model: a path or a `Model`; default the environment's GPTX_MODEL, else the demo.
    """
    return resolve(model).generate(prompt, params, **changes)


def resolve(model: str | os.PathLike[str] | Model | None) -> Model:
    """A model as it is, or the one of a path, which stays loaded; None is the environment's
    GPTX_MODEL, else the demo.
    """
    if isinstance(model, Model):
        return model
    if model is not None and not isinstance(model, str | os.PathLike):
        raise ParameterError("model", model, "a path, a Model or None")
    return _cached(Path(model or os.environ.get("GPTX_MODEL") or demo_path()))


def _open(path: Path, *, verify: bool) -> modelfile.ModelFile:
    if path.is_file() and modelfile.is_model_file(path):
        return modelfile.read(path, verify=verify)
    from gptx.convert import convert_in_memory

    return convert_in_memory(path)


def demo_path() -> Path:
    return Path(__file__).parent / "demo" / "demo.gptx"


def _thread_count(threads: int | None) -> int:
    """0 lets the core decide."""
    name, value = "threads", threads
    if threads is None:
        text = os.environ.get("GPTX_NUM_THREADS", "")
        if not text:
            return 0
        name, value = "GPTX_NUM_THREADS", int(text) if text.isdecimal() else text
    if type(value) is not int or not 1 <= value <= _MAX_THREADS:
        raise ParameterError(name, value, f"an integer from 1 to {_MAX_THREADS}")
    return value


def _memory() -> int:
    """Bytes that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_kv_cache_bytes() -> int:
    return min(_memory() // 4, _KV_CACHE_BYTES)


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warned:
        import logging

        _warned.add(text)
        logging.getLogger("gptx").warning(text)


_cache: dict[tuple[Path, int], Model] = {}


_cache_lock = threading.Lock()


def _cached(path: Path) -> Model:
    """The model of a path, loaded once for each version of the file."""
    key = (path.resolve(), path.stat().st_mtime_ns)
    with _cache_lock:
        if key not in _cache:
            _cache[key] = load(path)
        return _cache[key]


def _after_fork() -> None:
    global _cache_lock
    _cache_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
