"""Whatever the documentation points to exists: links, headings, files, modules, and the options of commands."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
from doc_pages import ALL_PAGES, REPOSITORY, blocks, page_name

from opt_megatron.cli import main

_LINK = re.compile(r"\]\((?!https?://|mailto:)([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.M | re.S)
# A path from the repository's root, or a module of the package, in `code`.
_PATH = re.compile(r"`((?:opt_megatron|tools|run_scripts|tests|benchmarks|docs)/[\w./-]*)`")
_MODULE = re.compile(r"\bopt_megatron(?:\.[a-z_]\w*)+")


@pytest.mark.parametrize("page", ALL_PAGES, ids=page_name)
def test_links_resolve(page):
    for link in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        target, _, heading = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page_name(page)}: there is no {target}"
        if heading:
            assert heading in headings(file), f"{page_name(page)}: {file.name} has no heading #{heading}"


def headings(page: Path) -> set[str]:
    """The anchors that GitHub and MyST give to a page's headings."""
    lines = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w -]", "", line.lower()).strip().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", ALL_PAGES, ids=page_name)
def test_paths_and_modules_exist(page):
    text = page.read_text(encoding="utf-8")
    if page.name == "CHANGELOG.md":
        return  # it speaks of what there was, too
    missing = [path for path in _PATH.findall(text) if not (REPOSITORY / path).exists()]
    missing += [name for name in set(_MODULE.findall(text)) if not resolves(name)]
    assert not missing, f"{page_name(page)} names what does not exist: {missing}"


def resolves(name: str) -> bool:
    """Whether a dotted name is a module of the package, or something in one."""
    package, _, last = name.rpartition(".")
    try:
        if importlib.util.find_spec(name) is not None:
            return True
    except ModuleNotFoundError:
        pass
    try:
        return hasattr(importlib.import_module(package), last)
    except ModuleNotFoundError:
        return bool(package) and resolves(package)


@pytest.mark.parametrize("page", ALL_PAGES, ids=page_name)
def test_options_of_commands_exist(page, capsys):
    text = "".join(block.text for language in ("bash", "console") for block in blocks(page, language))
    for line in text.replace("\\\n", " ").splitlines():
        found = re.search(r"(?:opt-megatron(?= [a-z])|tools/(\w+)\.py)((?: [a-z][\w-]*)*)", line)
        options = set(re.findall(r"(?<= )--[a-z][\w-]+", line[found.end() :])) if found else set()
        if found and options:
            known = help_text(found[1], found[2].split(), capsys)
            missing = [option for option in options if not re.search(rf"{option}\b(?!-)", known)]
            assert not missing, f"{page_name(page)}: {missing} in: {line.strip()}"


_HELP: dict[tuple[str | None, ...], str] = {}


def help_text(tool: str | None, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    name = tool or words.pop(0)
    arguments = [*(words[:1] if name == "evaluate" else []), "--help"]
    key = (tool, name, *arguments)
    if key not in _HELP:
        with pytest.raises(SystemExit), mock.patch.object(sys, "argv", [name, *arguments]):
            if tool:
                runpy.run_path(str(REPOSITORY / "tools" / f"{tool}.py"), run_name="__main__")
            main([name, *arguments])
        _HELP[key] = capsys.readouterr().out
    return _HELP[key]


def test_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 250
