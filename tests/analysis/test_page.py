"""The page's examples run, from top to bottom."""

import re
from pathlib import Path

import opt_megatron

PAGE = Path(opt_megatron.__file__).parent / "analysis" / "README.md"


def test_examples_run(tmp_path, monkeypatch, alone):
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks:
        line = text[: text.index(block)].count("\n")
        exec(compile("\n" * line + block, str(PAGE), "exec"), names)
    assert (tmp_path / "lens.png").stat().st_size > 10_000
