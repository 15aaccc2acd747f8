"""Files of torch.save are read without running or importing what they name, however hostile they are."""

import argparse
import collections
import contextlib
import os
import pickle
import struct
import sys
import zipfile

import pytest
import torch

from opt_megatron.checkpoint.storage.blocks import whole
from opt_megatron.checkpoint.storage.safe_unpickler import Inert
from opt_megatron.checkpoint.storage.torch_reader import TorchFile
from opt_megatron.errors import CheckpointError


def saved(path, content):
    torch.save(content, path)
    return TorchFile(path).content


def values(tensor):
    return tensor.read(whole(tensor.shape))


def archive(path, pickled: bytes, *, records=(), compression=zipfile.ZIP_STORED):
    """An archive as torch.save makes it, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", "little")
        for name, content in records:
            file.writestr(name, content)
    return path


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def call(module: str, name: str, *arguments: str) -> bytes:
    """module.name(*arguments), in opcodes."""
    texts = b"".join(b"X" + struct.pack("<I", len(a)) + a.encode() for a in arguments)
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + texts + b"tR"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_tensors_come_back_to_the_bit(tmp_path, dtype):
    tensor = torch.arange(12).view(3, 4).to(dtype)
    content = saved(tmp_path / "f", {"a": tensor, "scalar": torch.tensor(3.0), "none": torch.zeros(0, 4)})
    assert values(content["a"]).dtype == dtype and torch.equal(values(content["a"]), tensor)
    assert values(content["scalar"]).item() == 3 and values(content["none"]).shape == (0, 4)


def test_views_share_their_storage(tmp_path):
    base = torch.arange(12.0)
    content = saved(tmp_path / "f", {"base": base, "view": base.view(3, 4).t()[1:3]})
    assert torch.equal(values(content["view"]), base.view(3, 4).t()[1:3])
    assert content["view"].storage is content["base"].storage


def test_containers_namespaces_and_parameters(tmp_path):
    content = saved(
        tmp_path / "f",
        {
            "args": argparse.Namespace(layers=3, nested=argparse.Namespace(name="x")),
            "ordered": collections.OrderedDict(b=1, a=[1, (2.5, None), {True: b"bytes"}]),
            "size": torch.Size([2, 3]),
            "parameter": torch.nn.Parameter(torch.ones(2)),
        },
    )
    assert (content["args"].layers, content["args"].nested.name) == (3, "x")
    assert list(content["ordered"].items()) == [("b", 1), ("a", [1, (2.5, None), {True: b"bytes"}])]
    assert content["size"] == (2, 3) and torch.equal(values(content["parameter"]), torch.ones(2))


class Unknown:
    """A class that a reader elsewhere would not have."""

    def __init__(self):
        self.values = [1, 2]

    def __setstate__(self, state):
        raise AssertionError("the class was imported and its code was run")


def test_unknown_classes_become_inert_stubs(tmp_path):
    content = saved(tmp_path / "f", {"x": Unknown(), "kept": torch.ones(2), "error": ValueError("x")})
    assert isinstance(content["x"], Inert) and not hasattr(content["x"], "values")
    assert torch.equal(values(content["kept"]), torch.ones(2))


@pytest.mark.parametrize(
    "attack",
    [
        call("os", "system", "touch ran"),
        call("posix", "system", "touch ran"),
        call("builtins", "eval", "open('ran', 'w')"),
        call("__builtin__", "exec", "open('ran', 'w')"),
        call("builtins", "__import__", "antigravity"),
        call("subprocess", "check_output", "touch ran"),
        call("torch.serialization", "load", "other.pt"),
        call("builtins", "getattr", "x", "__class__") + b"(" + call("os", "system", "touch ran") + b"tR",
        b"(" + call("os", "system", "touch ran")[:-1] + b"i" + b"os\nsystem\n",  # INST
        b"cos\nsystem\n)\x81" + b"}X\x01\x00\x00\x00aK\x01sb",  # NEWOBJ, then BUILD
    ],
)
def test_code_is_never_run(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    path = archive(tmp_path / "f", opcodes(attack))
    with contextlib.suppress(CheckpointError):  # refusing is as good
        assert isinstance(TorchFile(path).content, Inert)
    assert os.listdir(tmp_path) == ["f"]


def test_known_classes_cannot_be_rewritten(tmp_path):
    # BUILD with (None, {name: value}) sets attributes of whatever is on the stack: here, of a class.
    attack = b"cargparse\nNamespace\nN}X\x08\x00\x00\x00__init__cos\nsystem\ns\x86b"
    before = argparse.Namespace.__init__
    TorchFile(archive(tmp_path / "f", opcodes(attack)))
    assert argparse.Namespace.__init__ is before


def nested_bomb(depth: int) -> bytes:
    """A tuple of two, of two, ... that share their parts: small to store, 2**depth leaves to walk through."""
    return b"K\x01" + b"q\x00h\x00\x86" * depth


@pytest.mark.parametrize(
    "attack",
    [
        nested_bomb(200),
        b"}" + nested_bomb(200) + b"K\x01s",  # as a key, it would be hashed
        b"(" + nested_bomb(200) + b"K\x01d",
        b"\x8f(" + nested_bomb(200) + b"\x90",
        b"(" + nested_bomb(200) + b"\x91",
        b"ccollections\nOrderedDict\n(](" + nested_bomb(200) + b"K\x01\x86etR",
        b"(" + b"(" * 100_000 + b"l" * 100_000,  # 100,000 lists inside each other
        b"]" * 100_000 + b"a" * 99_999,
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + nested_bomb(200) + b"X\x03\x00\x00\x00cpuK\x01tQ",
        b"(" + nested_bomb(200) + b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ",
        b"N" + b"r\xff\xff\xff\x7f",  # memo index 2**31 - 1
        b"\x8b\xff\xff\xff\x7fxx",  # an integer of 2 GiB that is not there
        b"\x8e" + b"\xff" * 7 + b"\x7f",  # bytes beyond any memory
        b"]("
        + b"K\x01" * 100_000
        + b"eq\x00"
        + b"ctorch\nSize\nq\x01"
        + b"(h\x01h\x00\x85R" * 1000
        + b"l",  # 1000 copies
    ],
)
@pytest.mark.timeout(20)
def test_bombs_neither_hang_nor_take_memory(tmp_path, attack):
    path = archive(tmp_path / "f", opcodes(attack))
    try:
        content = TorchFile(path).content
        assert content is None or isinstance(content, tuple | dict | list | set | frozenset)
    except CheckpointError as error:
        assert len(str(error)) < 1000


@pytest.mark.parametrize(
    "attack",
    [
        b"(" + b"\x8f" * 1_000_000 + b"t",  # sets
        b"(" + b"}" * 1_000_000 + b"t",
        b"N" + b"\x85" * 1_100_000,  # tuples in each other
        b"N" + b"\x94" * 1_100_000,  # the memo
        b"(" * 1_100_000,
        b"cargparse\nNamespace\nq\x00(" + b"h\x00)R" * 1_000_000 + b"t",
        b"}q\x00(" + b"".join(b"J" + struct.pack("<I", n) + b"N" for n in range(50_000)) + b"u"  # a state of 50,000
        b"cargparse\nNamespace\nq\x01(" + b"h\x01)Rh\x00b" * 1000 + b"t",
    ],
)
@pytest.mark.timeout(60)
def test_a_pickle_may_not_become_many_times_its_size(tmp_path, attack):
    with pytest.raises(CheckpointError, match=r"takes more memory than|containers in each other"):
        TorchFile(archive(tmp_path / "f", opcodes(attack)))


def test_integer_keys_cannot_be_chosen_to_have_one_hash(tmp_path):
    content = saved(tmp_path / "f", {"x": {k * sys.hash_info.modulus: None for k in range(-9, 9)} | {7: "plain"}})
    assert len({hash(key) for key in content["x"]}) == 19 and content["x"][7] == "plain"


def test_a_tensor_cannot_reach_beyond_its_storage_or_file(tmp_path):
    def attempt(offset, size, stride, elements, key=b"0"):
        def number(n):
            return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)

        def numbers(values):
            return b"(" + b"".join(map(number, values)) + b"t"

        storage = (
            b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX"
            + struct.pack("<I", len(key))
            + key
            + b"X\x03\x00\x00\x00cpu"
            + number(elements)
            + b"tQ"
        )
        tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + numbers(size) + numbers(stride)
        pickled = opcodes(tensor + b"\x89NtR")
        records = [("archive/data/0", struct.pack("<4f", 1, 2, 3, 4))]
        return TorchFile(archive(tmp_path / "f", pickled, records=records)).content

    assert values(attempt(1, [3], [1], 4)).tolist() == [2, 3, 4]
    for bad in (
        (2, [3], [1], 4),
        (-1, [3], [1], 4),
        (0, [5], [1], 4),
        (0, [2], [-1], 4),
        (0, [2, 2], [1], 4),
        (0, [1 << 40], [0], 1 << 62),
        (0, [4], [1], 5),
        (0, [4], [1], -4),
        (0, [4], [1], 4, b"../../etc/passwd"),
        (0, [4], [1], 4, b"1"),
    ):
        with pytest.raises(CheckpointError):
            attempt(*bad)


def test_a_tensor_whose_storage_is_repeated_is_refused_by_name(tmp_path):
    torch.save({"weight": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "f")
    file = TorchFile(tmp_path / "f")
    with pytest.raises(CheckpointError, match=r"f: weight is .*1,000,000,000,000 numbers, and the 1 that are stored"):
        file.tensors(file.content)


@pytest.mark.parametrize("offset", [0, 17])  # of a storage; an odd one is not aligned
@pytest.mark.parametrize("permuted", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_blocks_of_strided_tensors_and_no_more(tmp_path, monkeypatch, offset, permuted):
    """Rows with large gaps between them are read one by one, others in one piece."""
    from opt_megatron.checkpoint.storage import tensor_file

    base = torch.arange(20_000.0)[offset:].as_strided((4, 3, 1500), (4500, 1500, 1)).permute(permuted)
    tensor = saved(tmp_path / "f", {"a": base})["a"]
    for block in ((slice(1, 3), slice(0, 2), slice(2, 3)), (slice(0, 1), slice(1, 3), slice(0, 0)), whole(base.shape)):
        for gap in (0, 4096, 10**6):
            monkeypatch.setattr(tensor_file, "_SMALL_GAP", gap)
            assert torch.equal(tensor.read(block), base[block])


def test_a_file_that_is_truncated_while_it_is_read_is_an_error(tmp_path):
    content = saved(tmp_path / "f", {"a": torch.ones(300, 300)})
    os.truncate(tmp_path / "f", 1000)
    with pytest.raises(CheckpointError, match=r"had 361,\d+ bytes when it was opened and has 1,000 now"):
        values(content["a"])


def test_compressed_and_oversized_records_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is compressed"):
        TorchFile(archive(tmp_path / "f", opcodes(b"N"), compression=zipfile.ZIP_DEFLATED))


def test_paths_out_of_the_archive_write_nothing(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    records = [("../evil", b"x"), ("/tmp/opt_megatron_evil", b"x"), ("archive/data/../../../evil", b"x")]
    path = archive(inside / "f", opcodes(b"N"), records=records)
    assert TorchFile(path).content is None
    assert os.listdir(tmp_path) == ["inside"] and os.listdir(inside) == ["f"]
    assert not os.path.exists("/tmp/opt_megatron_evil")


@pytest.mark.parametrize("content", [b"", b"PK", b"not an archive", pickle.dumps({"old": "format"})])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is empty|truncated, or not a file that torch\.save wrote"):
        TorchFile(tmp_path / "f")


def test_every_truncation_of_a_file_is_refused(tmp_path):
    torch.save({"a": torch.arange(100.0), "b": torch.ones(3)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for kept in range(0, len(whole) - 1, 97):
        (tmp_path / "part").write_bytes(whole[:kept])
        with pytest.raises(CheckpointError):
            TorchFile(tmp_path / "part")


def test_flipped_bytes_give_values_or_a_refusal_and_nothing_else(tmp_path):
    torch.save({"a": torch.arange(10.0), "args": argparse.Namespace(x=1)}, tmp_path / "whole")
    whole = bytearray((tmp_path / "whole").read_bytes())
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for position in torch.randint(len(whole), (3,), generator=generator).tolist():
            damaged[position] ^= 1 << position % 8
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            TorchFile(tmp_path / "damaged")
        except CheckpointError as error:
            assert "\n" not in str(error)
