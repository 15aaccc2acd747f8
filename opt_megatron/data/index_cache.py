"""Where megatron-core's shuffled indices of a blend are kept between runs.

Core only checks whether its index files exist, and their names do not depend on the content of the data files. The
indices of one set of files and options therefore have a directory whose name is a hash of both. They are written in a
staging directory and renamed, so that a killed run leaves no incomplete index that a later one would use.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import xxhash

from ..errors import UserError, print_notice
from ..files import publish_directory, staging_directory
from .blend import Blend
from .indexed_dataset import check_tokens, open_indexed
from .options import DataOptions

_SAMPLED_PAGES, _PAGE_BYTES = 64, 4096  # of a data file, to tell it from another one of the same size


@dataclass(frozen=True)
class IndexCache:
    """The directory of the indices of one set of files and options.

    Attributes:
        path: where to read or write them.
        final: the directory's name once it is complete; None if `path` is for this run alone.
    """

    path: Path
    final: Path | None

    def check_shared(self, blends: list[Blend]) -> dict[str, str]:
        """What this rank sees of the data files, which must be the same on all ranks, by name.

        Raises:
            UserError: it does not see them, or the directory that the leader has created.
        """
        facts = {}
        for prefix in [prefix for blend in blends for prefix in blend.prefixes]:
            for path in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx")):
                if not path.is_file():
                    raise UserError(f"{path}: rank 0 has this file, but this rank does not see it")
                facts[str(path)] = _content_facts(path)
        if not self.path.is_dir():
            raise UserError(
                f"{self.path}: this rank does not see the directory of indices that rank 0 has made: "
                "set --data-cache-path to one on a file system that all machines share"
            )
        return facts

    def publish(self) -> None:
        """Rename the directory to its final name, unless another run has done so first."""
        if self.final is not None and self.path != self.final and not self.final.exists():
            publish_directory(self.path, self.final)

    def remove_unpublished(self) -> None:
        """Remove the directory if it was not published."""
        if self.path != self.final:
            shutil.rmtree(self.path, ignore_errors=True)


def open_cache(
    options: DataOptions, blends: list[Blend], seq_length: int, seed: int, vocab_size: int
) -> tuple[list[Blend], IndexCache]:
    """Check the files; returns the blends with their weights, and the cache, which may be filled or empty.

    Raises:
        UserError: files that are missing, damaged or hold too little, or token ids that the model does not have.
    """
    files = {prefix: open_indexed(prefix) for blend in blends for prefix in blend.prefixes}
    blends = [blend.weighted(files, seq_length) for blend in blends]
    name = _hash(list(files), blends, [seq_length, seed, vocab_size])
    root = Path(options.data_cache_path or Path(next(iter(files)), "cache"))
    if (root / name).is_dir():  # the token ids were checked when it was made
        return blends, IndexCache(root / name, root / name)
    for file in files.values():
        check_tokens(file, vocab_size)
    return blends, _new_cache(root, name, required=options.data_cache_path is not None)


def _content_facts(path: Path) -> str:
    """The size of a file, and a hash of some pages that are spread over it evenly."""
    digest, size = xxhash.xxh3_64(), path.stat().st_size
    with path.open("rb") as file:
        for number in range(_SAMPLED_PAGES):
            file.seek(number * max(0, size - _PAGE_BYTES) // (_SAMPLED_PAGES - 1))
            digest.update(file.read(_PAGE_BYTES))
    return f"{size} bytes, content {digest.hexdigest()}"


def _hash(prefixes: Sequence[str], blends: list[Blend], numbers: list[int]) -> str:
    stats = [Path(f"{prefix}{suffix}").stat() for prefix in prefixes for suffix in (".bin", ".idx")]
    identity = {
        "core": version("megatron-core"),
        "files": [resolved(prefix) for prefix in prefixes],
        "contents": [[stat.st_size, stat.st_mtime_ns] for stat in stats],
        "parts": [asdict(blend) for blend in blends],
        "numbers": numbers,
    }
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]


def resolved(prefix: str) -> str:
    """A prefix as an absolute path: megatron-core names its indices after the path as it is given."""
    return str(Path(prefix).resolve())


def _new_cache(root: Path, name: str, *, required: bool) -> IndexCache:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return IndexCache(staging_directory(root), root / name)
    except OSError as error:
        if required:
            raise UserError(f"--data-cache-path {root}: cannot be written: {error.strerror}") from None
        print_notice(
            f"{root}: cannot be written ({error.strerror}), so the indices of the data are not kept; "
            "--data-cache-path DIR keeps them"
        )
        return IndexCache(Path(tempfile.mkdtemp(prefix="opt-megatron-")), None)
