"""The pages of the documentation, and their blocks of code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
GUIDES = [REPOSITORY / "README.md", DOCS / "find_it.md", *sorted((DOCS / "guides").glob("*.md"))]
ALL_PAGES = [
    *sorted(REPOSITORY.glob("*.md")),
    *sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts),
]

_BLOCK = re.compile(r"(?:^<!-- not run: (?P<reason>.+?) -->\n+)?^```(?P<language>\w+)\n(?P<text>.*?)^```", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        line: the number of its first line in the page, from 1.
        not_run: the reason that a marker before the block gives for not running it; None without a marker.
    """

    text: str
    line: int
    not_run: str | None


def blocks(page: Path, language: str) -> list[Block]:
    """The page's blocks of one language, in order."""
    content = page.read_text(encoding="utf-8")
    return [
        Block(found["text"], content.count("\n", 0, found.start("text")) + 1, found["reason"])
        for found in _BLOCK.finditer(content)
        if found["language"] == language
    ]


def page_name(page: Path) -> str:
    """The path from the repository's root, for the names of tests."""
    return str(page.relative_to(REPOSITORY))


def commands(block: str) -> list[tuple[str, list[str]]]:
    r"""The commands after `$ ` with the lines of output below each.

    A command goes on after a line that ends with a backslash, and to the end of a here-document.
    """
    found: list[tuple[str, list[str]]] = []
    lines = iter(block.splitlines())
    for line in lines:
        if not line.startswith("$ "):
            found[-1][1].append(line)
            continue
        command = line[2:]
        heredoc = re.search(r"<<'?(\w+)'?", command)
        while command.endswith("\\") or (heredoc and not command.endswith(f"\n{heredoc[1]}")):
            command += "\n" + next(lines)
        found.append((command, []))
    return found
