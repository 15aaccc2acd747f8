"""From names to directories: paths first, the embedded model, and the Hub (a stand-in of it on loopback)."""

import os
import shutil
import subprocess
import sys

import pytest
from hub_server import COMMIT, HubServer

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY, locate
from opt_megatron.errors import CheckpointError


def test_a_file_is_a_place_too(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin", "restored.pt"):
        (tmp_path / name).touch()
        assert locate(str(tmp_path / name)) == tmp_path / name


def test_an_existing_directory_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("story") == EMBEDDED_DIRECTORY
    (tmp_path / "story").mkdir()
    assert locate("story").resolve() == tmp_path / "story"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such directory, and it is no model name"),
        ("a/b/c", "no such directory, and it is no model name"),
        ("opt-1.4b", "names are story, opt-125m, .*opt-175b"),
        ("opt-175b", "not on the Hub: ask Meta"),
        ("facebook/opt-125m", "HF_HUB_OFFLINE is set"),
        ("nobody/nothing", "does not hold it"),
        ("", "is a shell variable unset"),
        ("~nosuchuser/x", "no path that can be looked up"),
        ("x" * 5000, "no path that can be looked up"),
    ],
)
def test_what_cannot_be_found_says_so_in_one_line(name, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        locate(name)
    assert "\n" not in str(caught.value)


def fetch(name, server, cache, offline=False):
    """Locate in a fresh process, since the Hub's library reads its environment when it is imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    code = "import sys; from opt_megatron.checkpoint.locate import locate; print(locate(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, name], env=environment, capture_output=True, text=True, timeout=60
    )
    return done.stdout.strip(), done.stderr


@pytest.fixture
def server(tmp_path):
    """Repositories with safetensors and .bin, with .bin alone, and with neither."""
    both, only_bin, empty = (tmp_path / name for name in ("both", "only_bin", "empty"))
    for directory in (both, only_bin, empty):
        shutil.copytree(EMBEDDED_DIRECTORY, directory)
    (both / "pytorch_model.bin").write_bytes(b"large and not needed")
    (only_bin / "model.safetensors").rename(only_bin / "pytorch_model.bin")
    (only_bin / "flax_model.msgpack").write_bytes(b"not needed")
    (empty / "model.safetensors").unlink()
    server = HubServer({"facebook/opt-125m": both, "facebook/opt-66b": only_bin, "someone/empty": empty})
    yield server
    server.shutdown()


def test_download_then_offline_from_the_cache(server, tmp_path):
    directory, errors = fetch("opt-125m-en", server, tmp_path / "cache")
    assert directory.endswith(COMMIT), errors
    assert {"config.json", "vocab.json", "merges.txt", "model.safetensors"} <= set(os.listdir(directory))
    assert "pytorch_model.bin" not in server.fetched
    fetched = len(server.fetched)
    again, errors = fetch("facebook/opt-125m", server, tmp_path / "cache", offline=True)
    assert (again, len(server.fetched)) == (directory, fetched), errors


def test_bin_is_downloaded_only_where_there_are_no_safetensors(server, tmp_path):
    directory, errors = fetch("opt-66b", server, tmp_path / "cache")
    assert "pytorch_model.bin" in os.listdir(directory), errors
    assert "flax_model.msgpack" not in server.fetched


@pytest.mark.parametrize(
    ("name", "message"), [("someone/empty", "holds no weights"), ("someone/missing", "could not be downloaded")]
)
def test_repositories_without_weights_or_existence(server, tmp_path, name, message):
    directory, errors = fetch(name, server, tmp_path / "cache")
    assert directory == "" and message in errors
