"""Kinds of values: sizes as people write them."""

import pytest

from opt_megatron.errors import UserError
from opt_megatron.options.kinds import kind_of, size_in_bytes


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5_000_000_000), ("500MB", 500_000_000), ("2GiB", 2**31), ("1.5kB", 1500), ("77B", 77)]
)
def test_sizes_as_people_write_them(text, size):
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "5 apples", "-1", "5iB", "1e3", "9999999999TB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="write it as 500MB, 5GB or 2GiB"):
        size_in_bytes(text)


def test_a_text_without_a_unit_is_refused_and_a_number_is_bytes():
    with pytest.raises(UserError, match="'24' has no unit; write 24GB, 24GiB or 24B"):
        size_in_bytes("24")
    assert kind_of("Size").convert("size", 24) == 24
    with pytest.raises(UserError, match="size is -1, but must be a size"):
        kind_of("Size").convert("size", -1)


def test_a_kind_is_found_by_its_annotation():
    assert kind_of("Size | None").convert("size", "2GiB") == 2**31
    assert kind_of("tuple[str, ...]").convert("names", "one") == ("one",)
    with pytest.raises(KeyError):
        kind_of("complex")
