"""Options in a YAML file: read by --config, written as run.yaml.

A key is an option's name as on the command line, with _ or - between its words. Only the plain part of YAML is read:
no anchors, aliases or tags, numbers as in JSON (1e-3 is one), and `true` or `false`. A key without a value has its
default.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, first_line
from ..files import open_input
from .declaration import Option
from .kinds import shown

_MOST_BYTES = 1_000_000
_FLOAT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
# First characters, tag, pattern: YAML 1.2's core schema without octal and hexadecimal numbers. PyYAML has YAML 1.1's,
# where 1e-3 is a text, 012 is ten, and `no` is false.
_RESOLVERS = (
    ([*"~nN", ""], "null", re.compile(r"~|null|Null|NULL|")),
    ([*"tTfF"], "bool", re.compile(r"true|True|TRUE|false|False|FALSE")),
    ([*"-+0123456789"], "int", re.compile(r"[-+]?\d+")),
    ([*"-+.0123456789"], "float", _FLOAT),
)


class _Loader(yaml.SafeLoader):
    """Reads the plain part of YAML."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 (as in yaml's classes)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not read", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.tag = self.DEFAULT_SCALAR_TAG  # a text: numbers can be chosen so that their hashes are the same
                if key.value in keys:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
                keys.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as a text."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 (as in yaml's classes)

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    for _first, _tag, _pattern in _RESOLVERS:
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern.pattern})$"), _first)


def read_options_file(path: Path, options: Iterable[Option]) -> dict[str, Any]:
    """The values in a file, by the arguments' names.

    Args:
        options: those that there may be.

    Raises:
        UserError: the file cannot be read, or holds an unknown option, or a value of the wrong kind or range.
    """
    known = {name: declared for declared in options for name in _names(declared)}
    values: dict[str, Any] = {}
    for key, value in _read(path).items():
        declared = known.get(str(key).replace("-", "_"))
        if declared is None:
            raise UserError(f"{path}: there is no option {shown(key)}{_like(str(key), known)}")
        if declared.argument in values:
            raise UserError(f"{path}: {declared.argument} is there twice")
        if value is not None:
            values[declared.argument] = _checked(declared, value, f"{path}: {key}")
    return values


def _checked(declared: Option, value: Any, label: str) -> Any:
    try:
        converted = declared.convert(value, label)
        declared.check_range(converted, label)
    except UserError as error:
        message = str(error) if str(error).startswith(label) else f"{label}: {error}"
        items = value if isinstance(value, list) else [value]
        is_unquoted = declared.kind.word is str and any(isinstance(item, int | float | bool) for item in items)
        raise UserError(message + (' (quote a number that is a text, as in "0.3")' if is_unquoted else "")) from None
    return converted


def write_options(groups: Mapping[str, Mapping[str, Any]], header: str) -> str:
    """The text of a file with these options, each group behind a comment with its title."""
    parts = [f"# {line}\n" for line in header.splitlines()]
    for title, values in groups.items():
        if values:
            parts.append(f"\n# {title}\n" if title else "\n")
            plain = {name: _plain(value) for name, value in values.items()}
            parts.append(yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000))
    return "".join(parts)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _names(declared: Option) -> set[str]:
    flags = () if declared.positional else declared.all_flags
    return {declared.argument, *(flag.removeprefix("--").replace("-", "_") for flag in flags)}


def _like(key: str, known: Mapping[str, Option]) -> str:
    near = difflib.get_close_matches(key[:100].replace("-", "_"), known)
    return f"; did you mean {' or '.join(near)}?" if near else "; see --help"


def read_yaml_file(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        UserError: it cannot be read, or is not the plain part of YAML.
    """
    try:
        with open_input(path) as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > _MOST_BYTES:
        raise UserError(f"{path}: has more than {_MOST_BYTES:,} bytes and is no file of options")
    return parse_yaml(content, str(path))


def parse_yaml(content: str | bytes, where: str) -> Any:
    """What a YAML text holds, JSON included.

    Args:
        where: what messages begin with.

    Raises:
        UserError: it is not the plain part of YAML.
    """
    try:
        return yaml.load(content, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{where}: {line}{error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # characters that are no text, numbers of thousands of digits
        raise UserError(f"{where}: is no YAML: {first_line(error, 120)}") from None
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply") from None


def _read(path: Path) -> dict[Any, Any]:
    values = read_yaml_file(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no options: write a line `name: value` for each")
    return values
