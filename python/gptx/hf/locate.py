"""Where a model lies: a path, or a name that transformers has downloaded before. No network."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gptx.errors import ParameterError

_HUB_NAME = re.compile(r"[\w.\-]+(/[\w.\-]+)?")
_MOVED = {"gpt2": "openai-community", "distilgpt2": "distilbert"}
_MOVED |= {f"gpt2-{size}": "openai-community" for size in ("medium", "large", "xl")}


def locate(
    name: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    subfolder: str = "",
) -> Path:
    """The file or folder of a model.

    Args:
        name: a path, or the name of a model on the hub, which is then looked for in the cache of
            huggingface_hub.
        cache_dir: that cache; default as huggingface_hub: HF_HUB_CACHE, else ``hub`` in HF_HOME,
            else in ~/.cache/huggingface.
        revision: branch, tag or commit; default "main".
        subfolder: of the model in its repository.

    Raises:
        ParameterError: there is neither; gptx downloads nothing.
    """
    path = Path(name)
    if path.exists():
        return path / subfolder
    text = os.fspath(name)
    if _HUB_NAME.fullmatch(text):
        owner = _MOVED.get(text)
        for repository in (text, *([f"{owner}/{text}"] if owner else [])):
            snapshot = _snapshot(_cache(cache_dir), repository, revision or "main")
            if snapshot is not None:
                return snapshot / subfolder
    allowed = "a file or folder"
    if _HUB_NAME.fullmatch(text):
        allowed += (
            f", or a model in {_cache(cache_dir)}; gptx downloads nothing (hf download {text})"
        )
    raise ParameterError("pretrained_model_name_or_path", text, allowed)


def _cache(cache_dir: str | os.PathLike[str] | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")  # noqa: PTH118
    return Path(home).expanduser() / "hub"


def _snapshot(cache: Path, repository: str, revision: str) -> Path | None:
    """The folder of a revision, which ``refs`` resolves to a commit."""
    root = cache / ("models--" + repository.replace("/", "--"))
    ref = root / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    folder = root / "snapshots" / commit
    return folder if folder.is_dir() else None
