"""Every `console` block of the README and the guides runs, and prints what the page shows."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from doc_pages import GUIDES, blocks, commands, page_name

from opt_megatron.cli import main

# A tool of tools/ is a subcommand of opt-megatron under another name.
SUBCOMMANDS = {"convert_checkpoint": "convert", "preprocess_data": "preprocess"}


@pytest.mark.parametrize("page", GUIDES, ids=page_name)
def test_commands_print_what_the_page_shows(page, tmp_path, monkeypatch, alone):
    monkeypatch.chdir(tmp_path)  # one directory for a page: its later blocks use what the earlier ones wrote
    monkeypatch.setenv("COLUMNS", "80")
    for block in blocks(page, "console"):
        if block.not_run is not None:
            continue
        for command, expected in commands(block.text):
            where = f"{page_name(page)}, block at line {block.line}: {command}"
            code, output = run(command)
            assert code == 0, f"{where}\n{output}"
            if expected:
                assert as_pattern(expected).fullmatch(output.strip()), f"{where}\nprinted:\n{output}"


def run(command: str) -> tuple[int, str]:
    """Exit code, and stdout and stderr together. The project's own commands run in this process."""
    arguments = subcommand(command)
    if arguments is None:
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr
    written = io.StringIO()
    with (
        contextlib.redirect_stdout(written),
        contextlib.redirect_stderr(written),
        pytest.raises(SystemExit) as ended,
    ):
        main(arguments)
    return int(ended.value.code or 0), written.getvalue()


def subcommand(command: str) -> list[str] | None:
    """The arguments for `opt_megatron.cli.main`; None for a command of the shell."""
    words = shlex.split(command.replace("\\\n", " "))
    if words[0] == "opt-megatron":
        return words[1:]
    if words[0] == "python" and Path(words[1]).parent == Path("tools"):
        tool = Path(words[1]).stem
        return [SUBCOMMANDS.get(tool, tool.replace("_", "-")), *words[2:]]
    return None


def as_pattern(expected: list[str]) -> re.Pattern[str]:
    """`...` matches anything within a line; alone on a line, it matches any lines."""
    lines = [
        r"(?:.*\n)*?.*" if line.strip() == "..." else ".*".join(map(re.escape, line.split("..."))) for line in expected
    ]
    return re.compile("\n".join(lines).strip())


def test_the_wildcards():
    assert as_pattern(["a ... b", "...", "c"]).fullmatch("a 1 b\nx\ny\nc")
    assert not as_pattern(["a ... b"]).fullmatch("a 1 c")


def test_every_marker_gives_a_reason():
    reasons = [block.not_run for page in GUIDES for block in blocks(page, "console") if block.not_run is not None]
    assert all(len(reason.split()) > 2 for reason in reasons)
