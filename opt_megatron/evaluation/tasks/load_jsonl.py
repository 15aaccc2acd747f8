"""Reads the data of the tasks in this directory: files of JSON lines next to the YAML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opt_megatron.data.jsonl import numbered_lines, parse_object, read_text_file


def load_jsonl(file: str, **metadata: Any) -> dict[str, Any]:
    """The one split, `test`, of a task whose YAML names the file under `dataset_kwargs`."""
    from datasets import Dataset

    lines = numbered_lines(read_text_file(Path(__file__).parent / file))
    return {"test": Dataset.from_list([parse_object(line) for _, line in lines])}
