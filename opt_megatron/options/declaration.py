"""Options that are declared once, as fields of a dataclass.

    @dataclass(frozen=True)
    class SamplingParams:
        top_p: float = option(1.0, help="keep the best until ...", above=0, maximum=1, api_name="top_p")

From such a field come the argument `--top-p` (`cli/option_groups.py`, `from_arguments`), the checks of kind and range
(`convert_kinds`, `check_ranges`), the key `top_p` of a YAML file (`yaml_file.py`), the field of an HTTP body
(`serving/protocol.py`) and the row of the reference pages. No module that declares options imports torch, so that
`--help` is instant.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError
from .kinds import Kind, kind_of

NO_DEFAULT: Any = ...
_KEY = "option"  # of a field's metadata


@dataclass(frozen=True)
class Option:
    """All that is declared of one option.

    Attributes:
        help: what it does, in the words of `--help`; the default is added.
        minimum, above: the smallest value, included and excluded; of a list, each item's.
        maximum, below: the same for the largest.
        must: the words of messages after "but must", where those made from the range ("be at least 1") are not enough.
        choices: the only values, if there is a list of them.
        default_text: shown instead of a default that is None or depends on something.
        metavar: the placeholder of the value in `--help`.
        flags: instead of one made of the argument's name.
        argument: the name of the argument and of the YAML key, where it is not the field's.
        nargs: "+" takes several words after one flag; a list without it is a flag that may be repeated.
        required: there must be one on the command line (or in the YAML file).
        positional: the argument has no flag.
        cli: there is an argument, and a prompt may set it; False is for what the package sets.
        is_path: a file or a directory, or a name where there is none; relative to the working directory.
        api_name: the field of the completions API, which has this option if there is a name.
        api_minimum, api_maximum: the range over HTTP, where it is another one.
        name, annotation, default: of the field (NO_DEFAULT where a value must be given).
        named_by_flag: a command's messages name it as the command line does: declared in a subclass of `Options`.
    """

    help: str
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    must: str | None = None
    choices: tuple[str, ...] | tuple[int, ...] = ()
    default_text: str | None = None
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    argument: str = ""
    nargs: str | None = None
    required: bool = False
    positional: bool = False
    cli: bool = True
    is_path: bool = False
    api_name: str | None = None
    api_minimum: float | None = None
    api_maximum: float | None = None
    name: str = ""
    annotation: str = ""
    default: Any = NO_DEFAULT
    named_by_flag: bool = False

    @functools.cached_property
    def kind(self) -> Kind:
        """How its values are read."""
        return kind_of(self.annotation)

    @property
    def is_optional(self) -> bool:
        """Whether a value may be None."""
        return self.annotation.endswith(" | None")

    @property
    def flag(self) -> str:
        """The name on a command line, the first if there are several."""
        if self.positional:
            return self.argument
        return self.flags[0] if self.flags else "--" + self.argument.replace("_", "-")

    @property
    def all_flags(self) -> tuple[str, ...]:
        """Every name on a command line."""
        return self.flags or (self.flag,)

    @functools.cached_property
    def has_range(self) -> bool:
        """Whether some value of the right kind is refused."""
        bounds = (self.minimum, self.above, self.maximum, self.below)
        return self.annotation.startswith("float") or bool(self.choices) or any(bound is not None for bound in bounds)

    def bounds(self, *, api: bool = False) -> dict[str, float]:
        """The range as pydantic's Field names it: ge, gt, le, lt; with `api`, the range over HTTP."""
        named = {"ge": self.minimum, "gt": self.above, "le": self.maximum, "lt": self.below}
        if api and self.api_minimum is not None:
            named |= {"ge": self.api_minimum, "gt": None}
        if api and self.api_maximum is not None:
            named |= {"le": self.api_maximum, "lt": None}
        return {name: bound for name, bound in named.items() if bound is not None}

    def convert(self, value: Any, label: str) -> Any:
        """The value in its own type; a path becomes a text.

        Raises:
            UserError: it is of another kind; `label` is the name that the message begins with.
        """
        if value is None and self.is_optional:
            return None
        return self.kind.convert(label, str(value) if self.is_path and isinstance(value, Path) else value)

    def check_range(self, value: Any, label: str) -> None:
        """Check a value of the right kind.

        Raises:
            UserError: it is out of the range, not finite, or none of the choices.
        """
        if self.has_range and value is not None:
            items = value if self.kind.is_list else (value,)
            if not all(map(self._is_in_range, items)):
                must = self.must or f"be {self.range_in_words() or 'a finite number'}"
                raise UserError(f"{label} is {value}, but must {must}")

    def _is_in_range(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        return (
            (not isinstance(value, float) or math.isfinite(value))
            and (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
            and (self.below is None or value < self.below)
        )

    def range_in_words(self) -> str:
        """The range, as "at least 1"; nothing where there is none."""
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        if self.minimum is not None and self.maximum is not None:
            return f"from {self.minimum} to {self.maximum}"
        bounds = (("at least", self.minimum), ("above", self.above), ("at most", self.maximum), ("below", self.below))
        return " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)

    def help_with_default(self) -> str:
        """The help text for a command line."""
        return self.help + (f"; default: {self.default_in_words()}" if self.default_in_words() else "")

    def default_in_words(self) -> str:
        """The default, or an empty string where there is none to mention (None, false, an empty list)."""
        if self.default_text is not None:
            return self.default_text
        if self.default in (None, NO_DEFAULT, "", ()) or self.default is False:
            return ""
        if self.default is True:
            return "true"
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)


def option(default: Any = NO_DEFAULT, *, help: str, **declared: Any) -> Any:
    """A dataclass's field that is an option; `declared` are the attributes of `Option`."""
    metadata = {_KEY: Option(help, **declared)}
    return field(metadata=metadata) if default is NO_DEFAULT else field(default=default, metadata=metadata)


_DECLARED: dict[type, dict[str, Option]] = {}


def options_of(cls: type) -> dict[str, Option]:
    """The options that a dataclass declares, by the fields' names; fields of another sort are left out."""
    if cls not in _DECLARED:
        _DECLARED[cls] = {item.name: _complete(item, cls) for item in fields(cls) if _KEY in item.metadata}
    return _DECLARED[cls]


def _complete(item: Field[Any], cls: type) -> Option:
    """The option with what the field says of it."""
    declared: Option = item.metadata[_KEY]
    return dataclasses.replace(
        declared,
        name=item.name,
        annotation=str(item.type),
        default=NO_DEFAULT if item.default is MISSING else item.default,
        argument=declared.argument or item.name,
        named_by_flag=issubclass(cls, Options),
    )


def convert_kinds(values: Any) -> None:
    """Give every option of a new dataclass its own type, frozen or not.

    Raises:
        UserError: a value is of the wrong kind.
    """
    for name, declared in options_of(type(values)).items():
        object.__setattr__(values, name, declared.convert(getattr(values, name), name))


def check_ranges(values: Any) -> None:
    """Check every option of a dataclass against its range.

    Raises:
        UserError: a value is out of its range.
    """
    for name, declared in options_of(type(values)).items():
        declared.check_range(getattr(values, name), name)


class Options:
    """Base of dataclasses of options: kinds and ranges are checked when one is made.

    A command checks them before, under the names of the arguments.
    """

    def __post_init__(self) -> None:
        convert_kinds(self)
        check_ranges(self)


AnyOptions = TypeVar("AnyOptions")


def from_arguments(cls: type[AnyOptions], arguments: argparse.Namespace) -> AnyOptions:
    """A dataclass of options with the values of the arguments; those without an argument keep their defaults.

    Raises:
        UserError: a value is of the wrong kind or out of its range, or options contradict each other.
    """
    values = {
        name: declared.convert(getattr(arguments, declared.argument), declared.flag)
        for name, declared in options_of(cls).items()
        if declared.cli and hasattr(arguments, declared.argument)
    }
    return cls(**values)
