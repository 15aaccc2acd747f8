"""Write docs/reference/cli.md and docs/reference/sampling_parameters.md from the declared options.

python docs/make_options_reference.py
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a clone, installed or not

from opt_megatron.cli import COMMANDS, evaluate
from opt_megatron.cli.option_groups import declared_options
from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.options import Option, options_of

REFERENCE = Path(__file__).parent / "reference"
CLI = REFERENCE / "cli.md"
SAMPLING_PARAMETERS = REFERENCE / "sampling_parameters.md"

_MADE = (
    "Written by `python docs/make_options_reference.py` from the declared options. A test checks that it is current.\n"
)
_CLI_HEAD = f"""# Commands

{_MADE}
`opt-megatron COMMAND --help` prints the same options. A mistake is one line on stderr and exit code 2.

## Files of options

`--config FILE.yaml` reads options from a YAML file, in `generate`, `serve`, `evaluate`, `detect`, `logit-lens`,
`compress`, `train`, `convert`, `inspect` and `verify`. A key is the option's name without the leading hyphens, with `_`
or `-` between its words. The command line overrides the file, and the file the defaults:

```yaml
# generate.yaml
load: opt-125m
max_new_tokens: 40
top_p: 0.9
stop: ["\\n\\n"]
ignore_eos: true
```

`opt-megatron generate --config generate.yaml --top-p 0.8` then uses 0.8. A list is written as `[a, b]` or one item a
line. A key without a value has its default. The opposite flag, as `--no-ignore-eos`, turns off what the file turns on.
Unknown keys are refused. Anchors, aliases and tags are not read. Paths are relative to the working directory. Under
torchrun every rank reads the file.

`train` writes the options of a run, those that a preset determined included, into `SAVE/run.yaml`, with absolute
paths. `opt-megatron train --config SAVE/run.yaml` continues that run, as it has the same `save`;
`--save OTHER` repeats it from the beginning elsewhere.

`--config` with another file or a directory is the same as `--model-config`.
"""
_SAMPLING_HEAD = f"""# Sampling parameters

{_MADE}
The names are those of `SamplingParams` in Python, of the `options` of a prompt in a file of JSON lines, and of a YAML
file. The HTTP column names the field of `POST /v1/completions` and its range where it is a narrower or wider one
([HTTP API](http_api.md)).
"""


def cli() -> str:
    """The page of all commands."""
    parts = [_CLI_HEAD]
    for name in COMMANDS:
        module = importlib.import_module(f"opt_megatron.cli.{name.replace('-', '_')}")
        kinds = {f"{name} {kind}": of_kind for kind, of_kind in evaluate._KINDS.items()} if name == "evaluate" else {}
        for command, described in (kinds or {name: module}).items():
            parts += [f"## {command}\n", f"{_cell(described.HELP)[0].upper()}{_cell(described.HELP)[1:]}.\n"]
            parts += list(_groups(described.OPTIONS))
    return "\n".join(parts).rstrip() + "\n"


def _groups(groups: dict[str, tuple[type, ...]]) -> Iterator[str]:
    titles: dict[str, list[Option]] = {}
    for title, declared in declared_options(groups):
        titles.setdefault(title, []).append(declared)
    for title, options in titles.items():
        if title:
            yield f"**{_cell(title)}**\n"
        rows = [(_flags(declared), _values(declared), _default(declared), _cell(declared.help)) for declared in options]
        yield _table(("option", "value", "default", "what it does"), rows)


def sampling_parameters() -> str:
    """The page of all sampling parameters."""
    shown = {name: declared for name, declared in options_of(SamplingParams).items() if declared.cli}
    rows = [
        (f"`{name}`", _flags(declared), _http(declared), _values(declared), _default(declared), _cell(declared.help))
        for name, declared in shown.items()
    ]
    return f"{_SAMPLING_HEAD}\n{_table(('name', 'argument', 'HTTP', 'value', 'default', 'what it does'), rows)}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _flags(declared: Option) -> str:
    if declared.positional:
        return f"`{declared.metavar or declared.argument}`"
    required = " (required)" if declared.required else ""
    return ", ".join(f"`{flag}`" for flag in declared.all_flags) + required


def _values(declared: Option) -> str:
    if declared.choices:
        return ", ".join(f"`{choice}`" for choice in declared.choices)
    return _cell(", ".join(text for text in (declared.kind.noun, declared.range_in_words()) if text))


def _http(declared: Option) -> str:
    if declared.api_name is None:
        return ""
    bounds = declared.bounds(api=True)
    if bounds == declared.bounds():
        return f"`{declared.api_name}`"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return f"`{declared.api_name}`, {' and '.join(f'{words[name]} {bound}' for name, bound in bounds.items())}"


def _default(declared: Option) -> str:
    text = declared.default_in_words()
    return _cell(text) if declared.default_text is not None else f"`{text}`" if text else ""


def _cell(text: str) -> str:
    for mark in ("\\", "|", "<", "*", "`"):
        text = text.replace(mark, "\\" + mark)
    return text


if __name__ == "__main__":
    CLI.write_text(cli(), encoding="utf-8")
    SAMPLING_PARAMETERS.write_text(sampling_parameters(), encoding="utf-8")
