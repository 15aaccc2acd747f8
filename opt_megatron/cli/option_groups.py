"""A command's options: declared to argparse in groups, read from a file of --config, and completed with defaults.

The command line overrides the file, and the file overrides the defaults.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..options import NO_DEFAULT, Option, options_of

# A title of a part of --help (an empty one is the part that all commands have) and the dataclasses that it shows.
Groups = dict[str, tuple[type, ...]]
FILE_SUFFIXES = (".yaml", ".yml")


def declared_options(groups: Groups) -> Iterator[tuple[str, Option]]:
    """Every option that has an argument, behind its group's title; of two with the same argument the first."""
    seen = set()
    for title, classes in groups.items():
        for declared in (declared for cls in classes for declared in options_of(cls).values()):
            if declared.cli and declared.argument not in seen:
                seen.add(declared.argument)
                yield title, declared


def add_groups(parser: argparse.ArgumentParser, groups: Groups, *, file: bool = False) -> None:
    """Declare a command's options.

    Args:
        file: with --config, a file of these options.
    """
    if file:
        parser.add_argument(
            "--config",
            action=_ReadOptions,
            default=argparse.SUPPRESS,
            metavar="FILE",
            help="a YAML file of these options, which the command line overrides; a config.json (or its directory) is "
            "taken as --model-config",
        )
    made: dict[str, argparse._ActionsContainer] = {"": parser}
    for title, declared in declared_options(groups):
        if title not in made:
            made[title] = parser.add_argument_group(title)
        _add_argument(made[title], declared)
    parser.set_defaults(option_groups=groups)


def _add_argument(group: argparse._ActionsContainer, declared: Option) -> None:
    """Declare the argument of an option. The namespace has it only where it was given: defaults are filled in later.

    A switch that a file of options turns on is turned off again by the opposite of its flag, which is not shown.
    """
    words: dict[str, Any] = {"help": declared.help_with_default().replace("%", "%%"), "default": argparse.SUPPRESS}
    if declared.positional:
        group.add_argument(declared.argument, **words | _words_of_values(declared))
    elif declared.default is True:  # the opposite is what such a switch is for
        group.add_argument(*declared.all_flags, dest=declared.argument, action=argparse.BooleanOptionalAction, **words)
    elif declared.kind.word is None:
        group.add_argument(*declared.all_flags, dest=declared.argument, action="store_true", **words)
        words["help"] = argparse.SUPPRESS
        group.add_argument(_opposite(declared.flag), dest=declared.argument, action="store_false", **words)
    else:
        words["required"] = declared.required
        group.add_argument(*declared.all_flags, dest=declared.argument, **words | _words_of_values(declared))


def _words_of_values(declared: Option) -> dict[str, Any]:
    words: dict[str, Any] = {"type": declared.kind.word}
    metavar = declared.metavar or {"int": "N", "float": "X"}.get(declared.annotation.removesuffix(" | None"))
    if declared.choices:
        words["choices"] = declared.choices
    elif metavar:
        words["metavar"] = metavar
    if declared.nargs:
        words["nargs"] = declared.nargs
    elif declared.kind.is_list:
        words["action"] = "append"
    return words


def _opposite(flag: str) -> str:
    return "--" + flag.removeprefix("--no-") if flag.startswith("--no-") else "--no-" + flag.removeprefix("--")


class _ReadOptions(argparse.Action):
    """Reads the options of a YAML file into `namespace.from_file`; what they give is no longer required.

    Another file or a directory is the model's config.json, which --config named before there were files of options.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        name = str(values)
        if Path(name).suffix.lower() not in FILE_SUFFIXES:
            namespace.model_config = name
            return
        from ..options.yaml_file import read_options_file

        options = [declared for _, declared in declared_options(parser.get_default("option_groups"))]
        found = read_options_file(Path(name).expanduser(), options)
        namespace.from_file = getattr(namespace, "from_file", {}) | found
        for action in parser._actions:
            if action.dest in found:
                action.required = False


def complete(arguments: argparse.Namespace) -> argparse.Namespace:
    """Check the options on the command line, and add the others: the file's value, or the default.

    Returns:
        the namespace, with every value in the type of its option (tuples for lists, bytes for sizes), the home
        directory for the ~ of paths, and in `given` the names of the options that are not defaults.

    Raises:
        UserError: a value is of the wrong kind or out of its range.
    """
    from_file = vars(arguments).pop("from_file", {})
    arguments.given = frozenset(vars(arguments)) | frozenset(from_file)
    for _, declared in declared_options(vars(arguments).pop("option_groups", {})):
        is_given = hasattr(arguments, declared.argument)
        value = getattr(arguments, declared.argument, from_file.get(declared.argument, declared.default))
        value = None if value is NO_DEFAULT or value is None else declared.convert(value, declared.flag)
        if is_given and declared.named_by_flag:
            declared.check_range(value, declared.flag)
        setattr(arguments, declared.argument, _in_home(value) if declared.is_path else value)
    return arguments


def _in_home(value: Any) -> Any:
    """A path or several, with the home directory for ~: no shell has replaced it in a file."""
    if isinstance(value, tuple):
        return tuple(map(os.path.expanduser, value))
    return value if value is None else os.path.expanduser(value)


def comparable_options(arguments: argparse.Namespace, groups: Groups) -> dict[str, Any]:
    """What must be the same on all ranks, by flag. Of paths only whether they are given: the same files may be
    elsewhere on another machine."""
    compared: dict[str, Any] = {}
    for _, declared in declared_options(groups):
        value = getattr(arguments, declared.argument)
        compared[declared.flag] = "given" if declared.is_path and value is not None else value
    return compared


def resolved_options(arguments: argparse.Namespace, groups: Groups) -> dict[str, dict[str, Any]]:
    """The options of a completed namespace by their groups' titles, without those that are None."""
    resolved: dict[str, dict[str, Any]] = {}
    for title, declared in declared_options(groups):
        value = getattr(arguments, declared.argument)
        if value is not None:
            resolved.setdefault(title, {})[declared.argument] = value
    return resolved
