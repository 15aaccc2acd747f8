"""peft's adapter_config.json: which modules it adapts with which rank and scale, read and written as peft 0.21 does.

Names are those of transformers' OPTForCausalLM ("model.decoder.layers.0.fc1"): the canonical ones.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import regex

from ...config import OPTConfig
from ...errors import CheckpointError
from ...files import read_text
from ..adapter import Adapter
from ..parameter_mapping import PREFIX, canonical_shapes

CONFIG_FILE = "adapter_config.json"

# What is honoured here, and what changes no logits. Anything else must be off: a field that is not known might change
# what the adapter computes.
_HONOURED = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
             "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias"}  # fmt: skip
_WITHOUT_EFFECT = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
                   "lora_dropout", "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config",
                   "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"}  # fmt: skip
_DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "target_modules": ["q_proj", "v_proj"]}
# Ways to begin that leave the base model as it is; pissa, olora, corda, loftq and others change it too.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_NOT_LINEAR = ("model.decoder.embed_tokens", "model.decoder.embed_positions", "lm_head")
_MATCH_TIMEOUT_S = 1.0  # for one name, which takes microseconds unless the pattern backtracks without end


@dataclass(frozen=True)
class PeftConfig:
    """The content of an adapter_config.json that describes plain LoRA.

    Raises:
        CheckpointError: it asks for something else, which is named, or a value is not valid.
    """

    path: Path
    values: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> PeftConfig:
        """Read the file.

        Raises:
            CheckpointError: it cannot be read, or as for the class.
        """
        try:
            values = json.loads(read_text(path))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: holds a {type(values).__name__}, not an object")
        return cls(path, _DEFAULTS | {name: value for name, value in values.items() if value is not None})

    def __post_init__(self) -> None:
        kind, start = self.values.get("peft_type"), self.values.get("init_lora_weights")
        if kind != "LORA":
            raise self._unsupported("peft_type", "only LORA is")
        if start not in _PLAIN_STARTS:
            raise self._unsupported("init_lora_weights", "it has changed the base model's weights too")
        if self.values["bias"] != "none":
            raise self._unsupported("bias", "it has changed the base model's biases")
        for name in sorted(self.values.keys() - _HONOURED - _WITHOUT_EFFECT):
            if self.values[name]:
                raise self._unsupported(name, "merge it with peft's merge_and_unload, and load the result")

    def _unsupported(self, name: str, reason: str) -> CheckpointError:
        value = json.dumps(self.values.get(name))[:60]
        return CheckpointError(f"{self.path}: {name} is {value}, which is not supported here: {reason}")

    @property
    def base_model(self) -> str | None:
        """The name of the base model, where it is given."""
        name = self.values.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def dropout(self) -> float:
        """The dropout of training."""
        return self._number("lora_dropout", self.values["lora_dropout"])

    def updates(self, config: OPTConfig) -> dict[str, tuple[int, float]]:
        """Module -> rank and scale of its update.

        Raises:
            CheckpointError: the embedding or the head is to be adapted, or a value is not valid.
        """
        others = [name for name in _NOT_LINEAR if not self._is_all_linear and self._is_target(name)]
        if others:
            raise CheckpointError(
                f"{self.path}: target_modules includes {', '.join(others)}, which is not supported here: OPT's "
                "embedding and head are one matrix"
            )
        return {module: self._rank_and_scale(module) for module in _linear_modules(config) if self._is_target(module)}

    @property
    def _is_all_linear(self) -> bool:
        target = self.values["target_modules"]
        return isinstance(target, str) and target.lower() == "all-linear"

    def _is_target(self, module: str) -> bool:
        """Whether peft adapts the module (its `check_target_module_exists`)."""
        if self._is_named("exclude_modules", module):
            return False
        if self._is_all_linear:
            return True
        if not self._is_named("target_modules", module):
            return False
        targets, layers = self.values["target_modules"], self.values.get("layers_to_transform")
        if layers in (None, []) or isinstance(targets, str) or module in targets:
            return True
        return self._layer_of(module) in (layers if isinstance(layers, list) else [layers])

    def _is_named(self, field: str, module: str) -> bool:
        """Whether the field, one pattern or a list of names or of their last parts, names the module."""
        names = self.values.get(field, [])
        if isinstance(names, str):
            return self._matches(self._compile(names), module) is not None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{self.path}: {field} is neither a text nor a list of texts")
        return any(module == name or module.endswith(f".{name}") for name in names)

    def _layer_of(self, module: str) -> int | None:
        """The number that peft takes for the module's layer."""
        patterns = self.values.get("layers_pattern") or r"[^.]*"
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = self._matches(self._compile(rf"(?:.*?\.)?(?:{pattern})\.(?P<number>\d+)\..*"), module)
            if found:
                return int(found["number"])
        return None

    def _rank_and_scale(self, module: str) -> tuple[int, float]:
        rank = next((value for name, value in self._ranks if self._matches(name, module)), self.values["r"])
        alpha = next((value for name, value in self._alphas if self._matches(name, module)), self.values["lora_alpha"])
        alpha = self._number("lora_alpha", alpha)
        if type(rank) is not int or rank < 1:
            raise CheckpointError(f"{self.path}: the rank of {module} is {str(rank)[:20]}, but must be at least 1")
        return rank, alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    @cached_property
    def _ranks(self) -> list[tuple[regex.Pattern[str], Any]]:
        return self._patterns("rank_pattern")

    @cached_property
    def _alphas(self) -> list[tuple[regex.Pattern[str], Any]]:
        return self._patterns("alpha_pattern")

    def _patterns(self, field: str) -> list[tuple[regex.Pattern[str], Any]]:
        """The field's patterns, for the ends of names, and their values; the first that matches is used."""
        patterns = self.values.get(field, {})
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{self.path}: {field} is no object of names and numbers")
        return [(self._compile(rf"(?:.*\.)?(?:{name})"), value) for name, value in patterns.items()]

    def _compile(self, pattern: str) -> regex.Pattern[str]:
        try:
            return regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            raise CheckpointError(f"{self.path}: {pattern[:60]!r} is not a regular expression: {error}") from None

    def _matches(self, pattern: regex.Pattern[str], module: str) -> regex.Match[str] | None:
        try:
            return pattern.fullmatch(module, timeout=_MATCH_TIMEOUT_S)
        except TimeoutError:
            raise CheckpointError(f"{self.path}: {pattern.pattern[:60]!r} takes too long to match") from None

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"{self.path}: {name} is {str(value)[:20]!r}, but must be a number")
        return float(value)


def config_of_adapter(adapter: Adapter, config: OPTConfig) -> dict[str, Any]:
    """What adapter_config.json says of factors: the commonest rank and alpha, and the others by name."""
    ranks = {name.removesuffix(".weight"): found.rank for name, found in adapter.factors.items()}
    alphas = {name.removesuffix(".weight"): found.scale * found.rank for name, found in adapter.factors.items()}
    (rank, _), (alpha, _) = (Counter(values.values()).most_common(1)[0] for values in (ranks, alphas))
    last_parts = sorted({module.rpartition(".")[2] for module in ranks})
    covered = {module for module in _linear_modules(config) if module.rpartition(".")[2] in last_parts}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: _plain(value) for module, value in alphas.items() if value != alpha},
        "target_modules": last_parts if covered == set(ranks) else sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _linear_modules(config: OPTConfig) -> list[str]:
    """The modules whose weights are matrices of linear layers."""
    weights = [name for name, shape in canonical_shapes(config).items() if len(shape) == 2]
    return [name.removesuffix(".weight") for name in weights if not name.startswith(f"{PREFIX}embed_")]


def _plain(number: float) -> float | int:
    """An integer where it is one, as peft declares alpha."""
    return int(number) if number.is_integer() else number
