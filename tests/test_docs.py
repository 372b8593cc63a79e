"""The examples of the documents run as they stand, block after block."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
NEEDS = {"guided": "llguidance"}


def sections(name):
    """(heading, the python blocks of the section) of a document."""
    for part in re.split(r"^## ", (DOCS / name).read_text(), flags=re.MULTILINE):
        yield part.splitlines()[0], re.findall(r"```python\n(.*?)```", part, re.DOTALL)


@pytest.mark.parametrize(
    ("heading", "blocks"), list(sections("generation.md")), ids=lambda value: str(value)[:30]
)
def test_examples_of_generation_run(heading, blocks, tmp_path, monkeypatch, capsys):
    if not blocks:
        pytest.skip("a section without an example")
    for word, package in NEEDS.items():
        if any(f"gptx.{word}" in block for block in blocks):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "example"}
    first = next(blocks for _, blocks in sections("generation.md"))
    for block in [*first, *blocks]:
        exec(compile(block, heading, "exec"), namespace)
