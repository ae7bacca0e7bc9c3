"""The blocks of code of README.md, CONTRIBUTING.md and docs/."""

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "decisions").glob("*.md")),
]
_BLOCK = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    language: str
    """What follows the fence: `python`, `sh`, a directive of Sphinx in braces, or nothing."""
    text: str
    """Without the indentation of its fence; a block that continues another keeps its own."""


def blocks(page: Path, *languages: str) -> list[Block]:
    """Those of `page` in one of `languages`, or all, in their order."""
    found = [
        Block(language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE))
        for indent, language, text in _BLOCK.findall(page.read_text())
    ]
    return [b for b in found if not languages or b.language in languages]


def scripts(page: Path) -> list[str]:
    """The Python of `page`; a block that is indented goes on where the one before it ended."""
    found: list[str] = []
    for block in blocks(page, "python"):
        if block.text.startswith(" ") and found:
            found[-1] += block.text
        else:
            found.append(textwrap.dedent(block.text))
    return found
