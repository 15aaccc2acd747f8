"""Options in YAML files: what is read, what is refused in one line, and what is written comes back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from opt_megatron.errors import UserError
from opt_megatron.options import Options, Size, option, options_of
from opt_megatron.options.yaml_file import read_options_file, write_options


@dataclass(frozen=True)
class Command(Options):
    """One option of each sort."""

    lr: float = option(1e-3, help="the peak", above=0)
    train_iters: int | None = option(None, help="steps", minimum=1)
    data_path: tuple[str, ...] | None = option(None, help="prefixes", nargs="+")
    stop_token_ids: tuple[int, ...] = option((), help="ids", flags=("--stop-token-id",))
    logit_bias: tuple[tuple[int, float], ...] = option((), help="biases")
    revision: str | None = option(None, help="of a repository")
    style: str = option("linear", help="shape", choices=("linear", "cosine"))
    memory: Size | None = option(None, help="at the most")
    bf16: bool = option(False, help="half precision")


def read(path: Path, text: str) -> dict[str, Any]:
    """The options in a file with this text."""
    path.write_text(text, encoding="utf-8")
    return read_options_file(path, options_of(Command).values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("# nothing\n", {}),
        ("lr: 1e-3\ntrain-iters: 12\nbf16: true\n", {"lr": 1e-3, "train_iters": 12, "bf16": True}),
        ("lr: 2\nmemory: 2GB\nstyle: cosine", {"lr": 2, "memory": 2_000_000_000, "style": "cosine"}),
        ("memory: 5000\nrevision: no\n", {"memory": 5000, "revision": "no"}),
        ("data_path: [a, b]\nstop_token_id: [3, 4]\n", {"data_path": ("a", "b"), "stop_token_ids": (3, 4)}),
        ("data_path: a b\nlr:\ntrain_iters: null\n", {"data_path": ("a b",)}),
        ("logit_bias: {262: -5, 7: 0.5}", {"logit_bias": ((262, -5), (7, 0.5))}),
        ("logit_bias: [262=-5]", {"logit_bias": ((262, -5.0),)}),
    ],
)
def test_what_is_read(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    assert read(tmp_path / "run.yaml", text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train_itres: 3", "there is no option 'train_itres'; did you mean train_iters?"),
        ("zzz: 3", "there is no option 'zzz'; see --help"),
        ("data_path: [0.3, a]", 'quote a number that is a text, as in "0.3"'),
        ("1: 3", "there is no option '1'"),
        ("lr: high", "lr is 'high', but must be a number"),
        ("lr: 0", "lr is 0, but must be above 0"),
        ("lr: .nan", "lr is nan, but must be above 0"),
        ("train-iters: 1.5", "train-iters is 1.5, but must be a whole number"),
        ("bf16: yes", "bf16 is 'yes', but must be true or false"),
        ("revision: 123", "revision is 123, but must be a string"),
        ("style: square", "style is square, but must be one of linear, cosine"),
        ("memory: lots", "memory: 'lots' is not a size"),
        ("lr: 1\nlr: 2", "line 2: 'lr' is there twice"),
        ("train_iters: 1\ntrain-iters: 2", "train_iters is there twice"),
        ("data_path: &a [x]\nrevision: *a", "anchors and aliases are not read"),
        ("lr: !!python/object/apply:os.getcwd []", "line 1: could not determine a constructor"),
        ("lr: [", "line 1: "),
        ("- lr\n- 3", "holds no options"),
        ("lr: " + "[" * 5000, "is nested too deeply"),
        ("lr: \x00", "is no YAML"),
        ("train_iters: " + "9" * 5000, "is no YAML"),
        ("#" * 1_000_001, "has more than 1,000,000 bytes"),
    ],
)
def test_mistakes_are_one_line_with_the_files_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path / "run.yaml", text)
    said = str(caught.value)
    assert message in said and "\n" not in said and len(said) < 400
    assert said.startswith(f"{tmp_path / 'run.yaml'}: ")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read: No such file"):
        read_options_file(tmp_path / "none.yaml", options_of(Command).values())


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    values = {
        "lr": 1e-8,
        "train_iters": 7,
        "data_path": ("0.5", "null", "true", "1e-3", "a: b", "é", "012", "~"),
        "revision": "1e5",
        "logit_bias": ((3, -0.1), (4, 2)),
        "bf16": True,
    }
    text = write_options({"optimisation": values, "empty": {}}, "A run.")
    assert text.startswith("# A run.\n\n# optimisation\nlr: ") and "# empty" not in text
    assert read(tmp_path / "run.yaml", text) == values
