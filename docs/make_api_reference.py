"""Write docs/reference/python_api.md, and the tables of docs/reference/http_api.md, from the code.

python docs/make_api_reference.py
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).parent / "reference"
PYTHON_API = REFERENCE / "python_api.md"
HTTP_API = REFERENCE / "http_api.md"

_HEAD = """# Python API

Written by `python docs/make_api_reference.py` from signatures and docstrings. A test checks that it is current.

Shapes: b sequences, s tokens of each, H the hidden size.
"""
# What a script may import, in the order of the page.
PUBLIC = (
    ("opt_megatron", ("OPT",)),
    ("opt_megatron.weights", ("Weights",)),
    ("opt_megatron.generation.sampling.sampling_params", ("SamplingParams",)),
    ("opt_megatron.generation.sampling.watermark_options", ("DetectionOptions",)),
    ("opt_megatron.generation.sampling.watermark_detector", ("WatermarkDetection",)),
    ("opt_megatron.generation.request", ("Request", "TokenEvent", "Completion")),
    ("opt_megatron.generation.core.engine", ("Engine",)),
    ("opt_megatron.generation.core.request_queue", ("RequestQueue",)),
    ("opt_megatron.parallel.context", ("init_parallel", "ParallelContext")),
    ("opt_megatron.checkpoint.formats.registry", ("open_checkpoint",)),
    ("opt_megatron.checkpoint.load", ("load_model",)),
    ("opt_megatron.checkpoint.convert", ("convert",)),
    ("opt_megatron.compression.options", ("CalibrationOptions",)),
    ("opt_megatron.compression.recipe", ("Recipe", "find_recipe")),
    ("opt_megatron.compression.report", ("CompressionReport", "LayerReport")),
    ("opt_megatron.flagai", ("AutoLoader", "Predictor", "mpu")),
)
_SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises):")


def python_api() -> str:
    """The whole page."""
    parts = [_HEAD]
    for module_name, names in PUBLIC:
        module = importlib.import_module(module_name)
        parts.append(f"## `{module_name}`\n")
        for name in names:
            parts += _describe(name, getattr(module, name))
    return "\n".join(parts).rstrip() + "\n"


def _describe(name: str, thing: Any) -> Iterator[str]:
    if not inspect.isclass(thing):
        yield f"### `{name}`\n\n```text\n{_signature(name, thing)}\n```\n"
        yield _markdown(thing.__doc__)
        return
    yield f"### `{name}`\n"
    if not dataclasses.is_dataclass(thing) and "__init__" in _members(thing):
        yield f"```text\n{_signature(name, thing.__init__)}\n```\n"
    yield _markdown(thing.__doc__)
    for member, value in _members(thing).items():
        if member.startswith("_"):
            continue
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if inspect.isfunction(function):
            yield f"#### `{name}.{member}`\n\n```text\n{_signature(member, function)}\n```\n"
            yield _markdown(function.__doc__)
        elif isinstance(value, property) or type(value).__name__ == "cached_property":
            yield f"#### `{name}.{member}`\n"
            yield _markdown(value.__doc__)


def _members(thing: type) -> dict[str, Any]:
    """A class's own, and those of this package's classes that it is made from, which come first."""
    bases = [base for base in reversed(thing.__mro__) if base.__module__.split(".")[0] == "opt_megatron"]
    return {name: value for base in bases for name, value in vars(base).items()}


def _signature(name: str, function: Any) -> str:
    function = inspect.unwrap(function)
    shown, starred = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            shown.append("*")
        starred = starred or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        text = f"{star}{parameter.name}"
        if parameter.annotation is not parameter.empty:
            text += f": {parameter.annotation}"
        if parameter.default is not parameter.empty:
            default = "..." if callable(parameter.default) else repr(parameter.default)
            text += f" = {default}" if ": " in text else f"={default}"
        shown.append(text)
    returns = function.__annotations__.get("return")
    line = f"{name}({', '.join(shown)})"
    if len(line) > 110:
        line = f"{name}(\n" + "".join(f"    {text},\n" for text in shown) + ")"
    return line + (f" -> {returns}" if returns not in (None, "None") else "")


def _markdown(doc: str | None) -> str:
    """A docstring with its sections as lists."""
    lines: list[str] = []
    section = False
    for line in inspect.cleandoc(doc or "").splitlines():
        found = _SECTION.fullmatch(line)
        if found:
            section = True
            lines.append(f"{found[1]}:\n")
        elif section and line and not line.startswith(" "):
            section = False
            lines.append(line)
        elif section and re.match(r"    \S", line):
            item = re.match(r"    ([\w, *]+): (.*)", line)
            lines.append(f"- `{item[1]}`: {item[2]}" if item else f"- {line.strip()}")
        elif section:
            lines.append(f"  {line.strip()}" if line.strip() else "")
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


_BODIES = (
    ("Completions", "CompletionRequest", "`POST /v1/completions`"),
    ("metaseq's completions", "MetaseqRequest", "`POST /completions`, `/engines/{engine}/completions`"),
    ("Tokens of a text", "TokenizeRequest", "`POST /tokenize`"),
    ("Text of tokens", "DetokenizeRequest", "`POST /detokenize`"),
)
_BEGIN, _END = "<!-- the tables begin -->\n", "<!-- the tables end -->\n"


def http_api() -> str:
    """The page with new tables between its marks."""
    text = HTTP_API.read_text(encoding="utf-8")
    before, after = text[: text.index(_BEGIN)], text[text.index(_END) :]
    protocol = importlib.import_module("opt_megatron.serving.protocol")
    tables = [_table(title, route, getattr(protocol, name).model_json_schema()) for title, name, route in _BODIES]
    return before + _BEGIN + "\n" + "\n".join(tables) + after


def _table(title: str, route: str, schema: dict[str, Any]) -> str:
    rows = [f"### {title}\n", f"{route}\n", "| field | kind | range | default | |", "|---|---|---|---|---|"]
    for name, field in schema["properties"].items():
        options = [option for option in _flat(field) if option.get("type") != "null"]
        kinds = " or ".join(dict.fromkeys(_kind(option) for option in options))
        ranges = " or ".join(dict.fromkeys(filter(None, map(_range, options))))
        default = "" if name in schema.get("required", ()) else _default(field)
        rows.append(f"| `{name}` | {kinds} | {ranges} | {default} | {field.get('description', '')} |")
    return "\n".join(rows) + "\n"


def _flat(field: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "anyOf" in field:
        for option in field["anyOf"]:
            yield from _flat(option)
    else:
        yield field


def _kind(field: dict[str, Any]) -> str:
    kind = field.get("type", "object")
    if kind == "array":
        return f"list of {' or '.join(_plural(_kind(item)) for item in _flat(field.get('items', {})))}"
    return {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false"}.get(kind, kind)


def _plural(kind: str) -> str:
    return kind.replace("list", "lists", 1) if kind.startswith("list") else f"{kind}s"


_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def _range(field: dict[str, Any]) -> str:
    shown = [f"{words} {field[key]:g}" for key, words in _BOUNDS.items() if abs(field.get(key, 2**31)) < 2**31 - 1]
    if "maxLength" in field:
        shown.append(f"at most {field['maxLength']} characters")
    if "maxItems" in field or "maxProperties" in field:
        shown.append(f"at most {field.get('maxItems', field.get('maxProperties'))} items")
    return ", ".join(shown)


def _default(field: dict[str, Any]) -> str:
    value = field.get("default")
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    PYTHON_API.write_text(python_api(), encoding="utf-8")
    HTTP_API.write_text(http_api(), encoding="utf-8")
