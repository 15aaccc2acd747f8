"""`OPTConfig`, the architecture of an OPT model; the released sizes; Hugging Face's config.json.

Imports neither torch nor Megatron-core. `model/megatron_config.py` makes Megatron-core's TransformerConfig of it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError, UserError
from .files import read_text

LAYERNORM_EPSILON = 1e-5
POSITION_OFFSET = 2  # the table's row 2 is the first real position; row 1 is padding, row 0 is unused
BYTES_OF_DTYPE = {"float32": 4, "float16": 2, "bfloat16": 2}
DTYPES = tuple(BYTES_OF_DTYPE)
RELEASED_VOCAB_SIZE = 50272  # rows of every released OPT: 50265 tokens and 7 rows of padding
RELEASED_NUM_TOKENS = 50265
MOST_LAYERS = 10_000  # a number in a damaged file must not lead to lists of a billion names


@dataclass(frozen=True)
class OPTConfig:
    """The architecture of an OPT model.

    350m is the only released size whose `word_embed_proj_dim` differs from its `hidden_size`, and the only one with
    `do_layer_norm_before=False`.

    Attributes:
        vocab_size: rows of the embedding, padding included.
        max_position_embeddings: the most tokens of a sequence.
        has_final_layer_norm: there is a norm after the last layer.
        dtype: of the stored weights.
        name: of the model, if it is known.

    Raises:
        UserError: a size is below 1, or the hidden size does not divide by the heads.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    word_embed_proj_dim: int
    vocab_size: int = RELEASED_VOCAB_SIZE
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    has_final_layer_norm: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.0
    bos_token_id: int = 2
    eos_token_id: int = 2
    pad_token_id: int = 1
    dtype: str = "float16"
    name: str = ""

    def __post_init__(self) -> None:
        for field in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size"):
            _positive(field, getattr(self, field))
        for field in ("word_embed_proj_dim", "vocab_size", "max_position_embeddings"):
            _positive(field, getattr(self, field))
        if self.num_layers > MOST_LAYERS:
            raise UserError(
                f"num_layers is {self.num_layers}, more than the {MOST_LAYERS} that any model is taken to have"
            )
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} does not divide by num_attention_heads "
                f"{self.num_attention_heads}: correct the config"
            )
        check_dtype(self.dtype)

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_position_rows(self) -> int:
        """Rows of the position table, with the two that belong to no position."""
        return self.max_position_embeddings + POSITION_OFFSET

    @property
    def has_embedding_projection(self) -> bool:
        """Whether the embedding is narrower than the hidden state, with a projection between them, as in 350m."""
        return self.word_embed_proj_dim != self.hidden_size

    @property
    def num_tokens(self) -> int:
        """Vocabulary rows that belong to a token; the others are padding and are never sampled."""
        return RELEASED_NUM_TOKENS if self.vocab_size == RELEASED_VOCAB_SIZE else self.vocab_size

    def padded_vocab_size(self, ranks: int) -> int:
        """Rows of the vocabulary on `ranks` tensor parallel ranks together, each of which has as many."""
        return -(-self.vocab_size // ranks) * ranks

    @property
    def num_parameters(self) -> int:
        """Number of parameters, the tied output head counted once."""
        h, f, w = self.hidden_size, self.ffn_hidden_size, self.word_embed_proj_dim
        attention = 4 * (h * h + h)
        mlp = 2 * h * f + f + h
        norms = 2 * (2 * h)
        outside = self.vocab_size * w + self.num_position_rows * h
        outside += 2 * h if self.has_final_layer_norm else 0
        outside += 2 * h * w if self.has_embedding_projection else 0
        return self.num_layers * (attention + mlp + norms) + outside

    def replace(self, **changes: Any) -> OPTConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def check_token_ids(self, tokens: Iterable[int], what: str) -> None:
        """Raise UserError unless every id is in the vocabulary.

        Args:
            what: how the message calls the sequence ("prompt 3").
        """
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise UserError(f"{what} holds the id {token}, but ids go from 0 to {self.vocab_size - 1}")

    @classmethod
    def from_hf(cls, values: dict[str, Any], where: str = "config.json") -> OPTConfig:
        """Read Hugging Face's dictionary, with the dtype as `torch_dtype` (old) or as `dtype` (new).

        Args:
            where: the file, for messages.

        Raises:
            CheckpointError: it is not an OPT's, a value is missing or of the wrong type, or it sets an option that
                no released OPT has and that is not implemented here.
        """
        if values.get("model_type") != "opt":
            raise CheckpointError(f"{where}: model_type is {values.get('model_type')!r}, not 'opt'")
        _refuse_unsupported(values, where)
        hidden = _integer(values, "hidden_size", where)
        pre_norm = bool(values.get("do_layer_norm_before", True))
        dtype = values.get("dtype") or values.get("torch_dtype") or "float32"
        try:
            return cls(
                num_layers=_integer(values, "num_hidden_layers", where),
                hidden_size=hidden,
                num_attention_heads=_integer(values, "num_attention_heads", where),
                ffn_hidden_size=_integer(values, "ffn_dim", where),
                word_embed_proj_dim=_integer(values, "word_embed_proj_dim", where, hidden),
                vocab_size=_integer(values, "vocab_size", where),
                max_position_embeddings=_integer(values, "max_position_embeddings", where),
                do_layer_norm_before=pre_norm,
                has_final_layer_norm=pre_norm and not values.get("_remove_final_layer_norm", False),
                dropout=_probability(values, "dropout", where),
                attention_dropout=_probability(values, "attention_dropout", where, 0.0),
                bos_token_id=_integer(values, "bos_token_id", where, 2),
                eos_token_id=_integer(values, "eos_token_id", where, 2),
                pad_token_id=_integer(values, "pad_token_id", where, 1),
                dtype=dtype_name(dtype),
                name=str(values.get("_name_or_path") or ""),
            )
        except CheckpointError:
            raise
        except UserError as error:
            raise CheckpointError(f"{where}: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The dictionary that transformers reads as its OPTConfig, with both names of the dtype."""
        return {
            "_remove_final_layer_norm": self.do_layer_norm_before and not self.has_final_layer_norm,
            "activation_function": "relu",
            "architectures": ["OPTForCausalLM"],
            "attention_dropout": self.attention_dropout,
            "bos_token_id": self.bos_token_id,
            "do_layer_norm_before": self.do_layer_norm_before,
            "dropout": self.dropout,
            "dtype": self.dtype,
            "enable_bias": True,
            "eos_token_id": self.eos_token_id,
            "ffn_dim": self.ffn_hidden_size,
            "hidden_size": self.hidden_size,
            "init_std": 0.02,
            "layer_norm_elementwise_affine": True,
            "layerdrop": 0.0,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": "opt",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_layers,
            "pad_token_id": self.pad_token_id,
            "tie_word_embeddings": True,
            "torch_dtype": self.dtype,
            "use_cache": True,
            "vocab_size": self.vocab_size,
            "word_embed_proj_dim": self.word_embed_proj_dim,
        }

    @classmethod
    def from_directory(cls, directory: Path) -> OPTConfig:
        """Read `directory/config.json`.

        Raises:
            CheckpointError: the file is missing, is not JSON, or is not an OPT's.
        """
        return cls.from_file(Path(directory) / "config.json")

    @classmethod
    def from_path(cls, path: Path) -> OPTConfig:
        """Read a config.json, given by its own path or by its directory's.

        Raises:
            CheckpointError: as for `from_directory`.
        """
        return cls.from_file(path) if path.is_file() else cls.from_directory(path)

    @classmethod
    def from_file(cls, path: Path) -> OPTConfig:
        """Read a config.json.

        Raises:
            CheckpointError: as for `from_directory`.
        """
        try:
            values = json.loads(read_text(path))
        except FileNotFoundError:
            raise CheckpointError(f"{path.parent}: there is no {path.name}; put the model's there") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: holds a {type(values).__name__}, not an object")
        return cls.from_hf(values, str(path))


def check_dtype(name: str) -> None:
    """Raise UserError unless `name` is one of the dtypes that OPT is stored and run in."""
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")


def dtype_name(dtype: object) -> str:
    """A torch dtype as config files write it: float16, not torch.float16."""
    return str(dtype).removeprefix("torch.")


def _positive(field: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{field} is {value}, but must be at least 1")


def _integer(values: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = values.get(key, default)
    if value is None:
        raise CheckpointError(f"{where}: {key!r} is missing")
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"{where}: {key!r} is {value!r}, not an integer")
    return value


def _probability(values: dict[str, Any], key: str, where: str, default: float = 0.1) -> float:
    value = values.get(key, default)
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise CheckpointError(f"{where}: {key!r} is {value!r}, not a number from 0 up to 1")
    return float(value)


def _refuse_unsupported(values: dict[str, Any], where: str) -> None:
    # Options of transformers' OPTConfig that no released OPT uses (Galactica, for one, does).
    expected = {
        "activation_function": "relu",
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
    }
    for key, wanted in expected.items():
        if values.get(key, wanted) != wanted:
            raise CheckpointError(f"{where}: {key} is {values[key]!r}; only {wanted!r}, as in OPT, is supported")


@dataclass(frozen=True)
class ReleasedSize:
    """A released size: its config, its number of parameters, and the source of the numbers."""

    config: OPTConfig
    num_parameters: int
    url: str


def _released(
    name: str, layers: int, hidden: int, heads: int, ffn: int, embed: int, norm: str, parameters: int, url: str
) -> tuple[str, ReleasedSize]:
    pre_norm = norm == "pre"
    config = OPTConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_hidden_size=ffn,
        word_embed_proj_dim=embed,
        do_layer_norm_before=pre_norm,
        has_final_layer_norm=pre_norm,
        name=name,
    )
    return name, ReleasedSize(config, parameters, url)


_HF = "https://huggingface.co/facebook/{}/blob/main/config.json"
_METASEQ = "https://github.com/facebookresearch/metaseq/blob/main/projects/OPT/README.md"
# fmt: off
RELEASED_SIZES: dict[str, ReleasedSize] = dict((
    #         name        layers hidden heads  ffn   embed  norm    parameters       source
    _released("opt-125m",   12,   768,  12,   3072,   768, "pre",      125_239_296, _HF.format("opt-125m")),
    _released("opt-350m",   24,  1024,  16,   4096,   512, "post",     331_196_416, _HF.format("opt-350m")),
    _released("opt-1.3b",   24,  2048,  32,   8192,  2048, "pre",    1_315_758_080, _HF.format("opt-1.3b")),
    _released("opt-2.7b",   32,  2560,  32,  10240,  2560, "pre",    2_651_596_800, _HF.format("opt-2.7b")),
    _released("opt-6.7b",   32,  4096,  32,  16384,  4096, "pre",    6_658_473_984, _HF.format("opt-6.7b")),
    _released("opt-13b",    40,  5120,  40,  20480,  5120, "pre",   12_853_473_280, _HF.format("opt-13b")),
    _released("opt-30b",    48,  7168,  56,  28672,  7168, "pre",   29_974_540_288, _HF.format("opt-30b")),
    _released("opt-66b",    64,  9216,  72,  36864,  9216, "pre",   65_719_701_504, _HF.format("opt-66b")),
    _released("opt-175b",   96, 12288,  96,  49152, 12288, "pre",  174_604_468_224, _METASEQ),
))
# fmt: on


def released_name(name: str) -> str | None:
    """The key in RELEASED_SIZES for any name of a size: `opt-1.3b`, `facebook/opt-1.3b`, `opt-1.3b-en`, `1.3B`.

    Returns None if it is not the name of a released size.
    """
    key = name.strip().lower().removeprefix("facebook/").removesuffix("-en")
    key = key if key.startswith("opt-") else f"opt-{key}"
    return key if key in RELEASED_SIZES else None


def released_config(name: str) -> OPTConfig:
    """The config of a released size under any of its names.

    Raises:
        UserError: there is no such size.
    """
    key = released_name(name)
    if key is None:
        raise UserError(f"{name!r} is not a released OPT size; they are {', '.join(RELEASED_SIZES)}")
    return RELEASED_SIZES[key].config
