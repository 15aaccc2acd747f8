"""Reads the data of the tasks in this directory, which lie in JSON lines next to the YAML files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def load_jsonl(file: str, **metadata: Any) -> dict[str, Any]:
    """The one split, `test`, of a task whose YAML names the file under `dataset_kwargs`."""
    from datasets import Dataset

    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
