"""The compiled core. Private: use the gptx package."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Buffer

__version__: str

class MappedFile:
    """A read-only mapping of a regular file; has the buffer protocol. Raises OSError."""

    def __init__(self, path: str) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def xxh64(data: Buffer) -> int: ...
def checksums(buffers: Sequence[Buffer], threads: int = 1) -> list[int]: ...
def usable_cpus() -> int: ...
def usable_isas() -> list[str]: ...

cuda_build: str

def cuda_status(path: str) -> dict[str, object]: ...

class Engine:
    """Requests in, tokens out. Ids are checked again; everything else is checked in Python."""

    def __init__(
        self,
        config: Mapping[str, object],
        dtype: str,
        tensors: Mapping[str, Buffer],
        *,
        device: str = "cpu",
        threads: int = 0,
        isa: str = "",
        precision: str = "",
        kv_cache_dtype: str = "",
        kv_cache_bytes: int | None = 0,
        ordinal: int = 0,
        cuda_library: str = "",
    ) -> None: ...
    def submit(
        self,
        ids: ArrayLike,
        *,
        sampling: dict[str, Any],
        max_new_tokens: int,
        min_new_tokens: int = 0,
        end_tokens: Sequence[int] = ...,
    ) -> int: ...
    def advance(self, requests: Sequence[int]) -> list[tuple[int, int, str]]: ...
    def release(self, request: int) -> None: ...
    def logits(self, ids: ArrayLike) -> NDArray[np.float32]: ...
    def reset_after_fork(self) -> None: ...
    @property
    def free_blocks(self) -> int: ...
    @property
    def kv_block_bytes(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def kv_cache_dtype(self) -> str: ...
