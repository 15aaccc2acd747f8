"""Finds the local directory for the value of --load: a path, a model name, or a Hub repository.

huggingface_hub downloads and caches repositories; it reads `HF_HOME`, `HF_HUB_OFFLINE` and `HF_TOKEN`.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..config import RELEASED_SIZES, released_name
from ..errors import CheckpointError, first_line

EMBEDDED_NAME = "story"
EMBEDDED_DIRECTORY = Path(__file__).parent.parent / "assets" / "story-opt"
_TEXT_FILES = ["*.json", "*.txt"]
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(name: str, revision: str | None = None) -> Path:
    """The local path of a checkpoint.

    Args:
        name: a path, `story` (the embedded toy model), a released size under any of its names, or
            `owner/repository`. A path that exists takes precedence, be it a directory or one file that is a whole
            model. Repositories are looked up in the Hub's cache, and downloaded if they are not there.
        revision: branch, tag or commit of a repository.

    Raises:
        CheckpointError: there is no such directory and no such model, or it cannot be downloaded.
    """
    if not name:
        raise CheckpointError("an empty name was given for a checkpoint; is a shell variable unset?")
    try:
        path = Path(name).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a name too long, a zero byte
        raise CheckpointError(f"{name[:100]!r}: is no path that can be looked up: {error}") from None
    if name == EMBEDDED_NAME:
        return EMBEDDED_DIRECTORY
    size = released_name(name)
    if size == "opt-175b":
        raise CheckpointError(
            f"{name}: there is no such directory, and the weights of opt-175b are not on the Hub: "
            "ask Meta for them and give their directory"
        )
    if size is not None:
        return download(f"facebook/{size}", revision)
    if _REPOSITORY.fullmatch(name):
        return download(name, revision)
    raise CheckpointError(
        f"{name}: there is no such directory, and it is no model name; names are "
        f"{EMBEDDED_NAME}, {', '.join(RELEASED_SIZES)} or a Hub repository as owner/name"
    )


def download(repository: str, revision: str | None = None) -> Path:
    """The Hub repository's snapshot, from the cache or the network: config, tokenizer and one kind of weights.

    Raises:
        CheckpointError: it is not cached and cannot be downloaded, with the reason.
    """
    from huggingface_hub import constants, snapshot_download

    def snapshot(patterns: list[str]) -> Path:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_TEXT_FILES + patterns))

    try:
        directory = snapshot(["*.safetensors"])
        if not any(directory.glob("*.safetensors")):  # several facebook/opt repositories hold .bin only
            directory = snapshot(["pytorch_model*.bin", "adapter_model.bin"])
    except Exception as error:  # the errors of requests, httpx and huggingface_hub have no common base
        offline = " and HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        raise CheckpointError(
            f"{repository}: there is no such directory, the Hub's cache ({constants.HF_HUB_CACHE}) does not "
            f"hold it{offline}, and it could not be downloaded: {first_line(error)}"
        ) from None
    if not any(directory.glob("*.safetensors")) and not any(directory.glob("*.bin")):
        raise CheckpointError(
            f"{repository}: the snapshot {directory} holds no weights; download it again with HF_HUB_OFFLINE unset"
        )
    return directory
