"""run_scripts/*.sh: what they call exists, and is called where the user is, so that relative paths are the user's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "run_scripts"
# Stand-ins: each notes its directory and its arguments. `python -c` is environment.sh's question for its prefix.
STAND_IN = '#!/bin/sh\n[ "$1" = -c ] && exec echo {place}\n{{ pwd; printf "%s\\n" "$@"; echo; }} >>{place}/calls\n'
NAMES = sorted(path.name for path in SCRIPTS.glob("*.sh") if path.name not in ("environment.sh", "test.sh"))


@pytest.mark.parametrize("name", NAMES)
def test_a_script_runs_tools_of_the_repository_in_the_callers_directory(tmp_path: Path, name: str) -> None:
    tools, here = tmp_path / "tools", tmp_path / "here"
    tools.mkdir()
    here.mkdir()
    for program in ("python", "torchrun", "opt-megatron", "nvidia-smi"):
        (tools / program).write_text(STAND_IN.format(place=tmp_path))
        (tools / program).chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(SCRIPTS / name), "first", "second", "third"],
        cwd=here, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls = [call.split("\n") for call in (tmp_path / "calls").read_text().rstrip("\n").split("\n\n")]
    assert calls and all(directory == str(here) for directory, *_ in calls)
    called = [Path(word) for _, *words in calls for word in words if word.endswith(".py")]
    assert called and all(path.parent == SCRIPTS.parent / "tools" and path.is_file() for path in called)
