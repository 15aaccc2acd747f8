"""What this program writes aside is its own; a directory of somebody else is never emptied or written through."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from opt_megatron.errors import UserError
from opt_megatron.files import claim_directory, publish_directory, recover_directory, staging_directory
from opt_megatron.files import claimed_directory as module


def content(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def link(path: Path) -> None:
    path.with_name("victim").mkdir()
    (path.with_name("victim") / "thesis.txt").write_text("years")
    path.symlink_to("victim")


def directory_with(name: str, text: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / name).write_text(text)

    return make


def claimed_with_a_link(path: Path) -> None:
    claim_directory(path)
    (path / "model.safetensors").symlink_to("elsewhere")


@pytest.mark.parametrize(
    "make",
    [link, Path.touch, os.mkfifo, claimed_with_a_link, directory_with("thesis.txt", "years"),
     directory_with("journal.jsonl", "Dear diary\n"), directory_with("journal.jsonl", '{"made_by": "me"}\n[1]\n')],
)  # fmt: skip
def test_what_this_program_has_not_made_is_refused_and_left(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / ".out.partial"
    make(path)
    before = content(tmp_path)
    with pytest.raises(UserError, match=r"\.out\.partial: is .* not made by this program.*move it away"):
        claim_directory(path)
    assert content(tmp_path) == before


def test_what_an_earlier_run_has_left_is_emptied(tmp_path: Path) -> None:
    for _ in range(2):
        claim_directory(tmp_path / "x")
        assert list(content(tmp_path / "x")) == ["journal.jsonl"]
        (tmp_path / "x" / "a").mkdir()
        (tmp_path / "x" / "a" / "file").write_text("old")


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_directory_is_replaced_whatever_the_moment_at_which_the_process_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    """Every call that changes something may be the last one; afterwards the target is the old or the new directory."""
    if not can_exchange:
        monkeypatch.setattr(module, "_exchange", lambda first, second: False)
    target, path = tmp_path / "out", tmp_path / ".out.partial"
    seen = []
    for last in itertools.count():
        directory_with("x", "old")(target)
        claim_directory(path)
        (path / "x").write_text("new")
        if not killed_at_call(monkeypatch, last, lambda: publish_directory(path, target, replace=True)):
            break
        assert target.exists() or not can_exchange
        recover_directory(target)
        seen.append(content(target)["x"])
        assert content(target) == {"x": seen[-1]}
        claim_directory(path)  # what is left is this program's
        for name in (target, path):
            shutil.rmtree(name)
        assert not list(tmp_path.iterdir())
    assert seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}
    assert content(tmp_path) == {"out/x": "new"}


class KilledError(BaseException):
    pass


def killed_at_call(monkeypatch: pytest.MonkeyPatch, last: int, action: Callable[[], None]) -> bool:
    """Whether the action made as many calls, and was ended by an exception that nothing handles."""
    calls = itertools.count()
    with monkeypatch.context() as patched:

        def limit(owner: object, name: str) -> None:
            real = getattr(owner, name)

            def limited(*arguments: object, **options: object) -> object:
                if next(calls) == last:
                    raise KilledError
                return real(*arguments, **options)

            patched.setattr(owner, name, limited)

        for owner, name in ((Path, "rename"), (Path, "unlink"), (module, "_exchange"), (shutil, "rmtree")):
            limit(owner, name)
        try:
            action()
        except KilledError:
            return True
    return False


def test_a_users_directory_is_in_the_way_of_neither_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_exchange", lambda first, second: False)
    for name in ("out", ".out.replaced"):
        directory_with("thesis.txt", "years")(tmp_path / name)
    claim_directory(tmp_path / ".out.partial")
    recover_directory(tmp_path / "out")
    with pytest.raises(UserError, match=r"\.out\.replaced: is there"):
        publish_directory(tmp_path / ".out.partial", tmp_path / "out", replace=True)
    assert content(tmp_path / "out") == content(tmp_path / ".out.replaced") == {"thesis.txt": "years"}


def test_staging_directories_are_distinct_and_stale_ones_removed(tmp_path: Path) -> None:
    first, second = staging_directory(tmp_path), staging_directory(tmp_path)
    directory_with("thesis.txt", "years")(tmp_path / ".building-site")
    assert first != second and first.is_dir() and first.stat().st_mode & 0o055 == 0o055
    two_days_ago = time.time() - 2 * 24 * 3600
    for path in (first, tmp_path / ".building-site"):
        os.utime(path, (two_days_ago, two_days_ago))
    staging_directory(tmp_path)
    assert not first.exists() and second.exists() and (tmp_path / ".building-site").exists()
