"""One random model, in the form that each system reads: Hugging Face safetensors and CTranslate2's files.

Runs in a child process, so that the memory for making a model is free again before anything is measured.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from opt_megatron.config import OPTConfig
from opt_megatron.files import PartialDirectory

from .random_weights import save_random


def model_directory(work_dir: Path, name: str, config: OPTConfig) -> Path:
    """Where a model of this shape is kept; another shape has another directory."""
    values = json.dumps(config.to_hf(), sort_keys=True)
    return work_dir / f"{name}-{hashlib.sha256(values.encode()).hexdigest()[:8]}"


def huggingface_directory(model: Path) -> Path:
    """The Hugging Face files, which this project and transformers read."""
    return model / "hf"


def ctranslate2_directory(model: Path, dtype: str) -> Path:
    """CTranslate2's files in `dtype` ("float32" or "int8")."""
    return model / f"ctranslate2-{dtype}"


def make_huggingface(model: Path, config: OPTConfig, *, device: str = "cpu") -> Path:
    """The random model's Hugging Face files in the config's dtype, which are made unless they exist already."""
    target = huggingface_directory(model)
    if not target.is_dir():
        with PartialDirectory(target) as partial:
            save_random(config, partial.path, device=device)
            partial.publish()
    return target


def make_model(model: Path, config: OPTConfig, ctranslate2_dtypes: tuple[str, ...]) -> None:
    """Make the random model in float32 and its conversions, unless they exist already."""
    target = make_huggingface(model, config.replace(dtype="float32"))
    for dtype in ctranslate2_dtypes:
        converted = ctranslate2_directory(model, dtype)
        if not converted.is_dir():
            with PartialDirectory(converted) as partial:
                _convert(target, partial.path, dtype, config)
                partial.publish()


def _convert(source: Path, target: Path, dtype: str, config: OPTConfig) -> None:
    from ctranslate2.converters import TransformersConverter
    from transformers.utils import logging

    logging.disable_progress_bar()

    class Converter(TransformersConverter):
        """CTranslate2 wants a vocabulary of strings, and a random model has no tokenizer to take it from."""

        def load_tokenizer(self, tokenizer_class: type, name: str, **options: object) -> _NumberTokenizer:
            return _NumberTokenizer(config)

    Converter(str(source)).convert(str(target), quantization=dtype, force=True)


class _NumberTokenizer:
    """The part of a tokenizer that the converter needs: token 17 is called "17"."""

    def __init__(self, config: OPTConfig) -> None:
        self.bos_token = str(config.bos_token_id)
        self.eos_token = str(config.eos_token_id)
        self.unk_token = "3"
        self._size = config.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """The vocabulary, token -> id."""
        return {str(number): number for number in range(self._size)}
