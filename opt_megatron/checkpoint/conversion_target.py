"""The directory that a conversion writes: where it really is, and whether it may be written."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import UserError, shorten
from .formats.registry import all_formats, is_checkpoint

# Files of any checkpoint's directory, besides those of its format.
_COMMON_NAMES = (
    r"config\.json|generation_config\.json|vocab\.json|merges\.txt|tokenizer\.json|tokenizer_config\.json"
    r"|special_tokens_map\.json|added_tokens\.json|opt_megatron_manifest\.json|README\.md|LICENSE[^/]*|\.gitattributes"
    r"|compression_report\.(json|md|png)"
)


def resolve_target(target: Path) -> Path:
    """The target with links followed, so that what they point to is written.

    Raises:
        UserError: it cannot be looked up.
    """
    try:
        resolved = target.resolve()
        if resolved.is_symlink():  # from Python 3.13 on; before, an error is raised
            raise OSError("its links lead in a circle")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{str(target)[:100]!r}: is no path that can be written: {error}") from None
    return resolved


def check_target(source: Path, target: Path, force: bool) -> None:
    """Raise UserError unless `target` may be written: new, empty, or nothing but a checkpoint and `force` is set."""
    try:
        if target == source.resolve() or target in source.resolve().parents:
            raise UserError(f"{target}: is the source or holds it; give another directory to --save")
        if target.exists() and not target.is_dir():
            raise UserError(f"{target}: is not a directory; give another one to --save")
        if not target.is_dir() or not any(target.iterdir()):
            return
        strange = _strange_names(target)
        if strange or not is_checkpoint(target):
            what = f"holds {shorten(strange, 3)}" if strange else "is not empty"
            raise UserError(f"{target}: {what} and is no checkpoint alone, so it is left alone; give another --save")
    except OSError as error:
        raise UserError(f"{target}: cannot be looked at: {error.strerror}") from None
    if not force:
        raise UserError(f"{target}: is a checkpoint already; --force replaces it")


def _strange_names(directory: Path) -> list[str]:
    """The files below a directory, as relative paths, that its format does not have: they would be lost with it."""
    found = next((known for known in all_formats() if known.detect(directory)), None)
    known = f"{_COMMON_NAMES}|{found.file_names}" if found is not None and found.file_names else _COMMON_NAMES
    files = [child for child in directory.rglob("*") if child.is_symlink() or not child.is_dir()]
    names = (file.relative_to(directory).as_posix() for file in files)
    return sorted(name for name in names if not re.fullmatch(known, name))
