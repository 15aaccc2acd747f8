"""`ServedModel`: an engine with its tokenizer, and the names that clients call the model by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..config import OPTConfig
from ..generation.core.engine import Engine
from ..generation.generation_config import GenerationConfig
from ..generation.sampling.watermark_options import WatermarkOptions
from ..tokenizer import BOS_TOKEN, OPTTokenizer
from .errors import ApiError


@dataclass(frozen=True)
class ServedModel:
    """A loaded model that is ready to generate.

    Attributes:
        names: accepted in the field `model` of requests; responses carry the first.
        generation_config: has the sampling options of requests that do not give them.
        watermark: of every text, if it has a delta; requests cannot change it.
    """

    engine: Engine
    tokenizer: OPTTokenizer
    config: OPTConfig
    names: tuple[str, ...]
    generation_config: GenerationConfig = field(default_factory=GenerationConfig)
    watermark: WatermarkOptions = field(default_factory=WatermarkOptions)

    @property
    def name(self) -> str:
        """The name that responses carry."""
        return self.names[0]

    @property
    def max_model_len(self) -> int:
        """The largest number of tokens of prompt and continuation together."""
        return self.config.max_position_embeddings

    def check_name(self, name: str | None) -> None:
        """Check the model name in a request; None accepts any.

        Raises:
            ApiError: 404, the server has no model of this name.
        """
        if name is not None and name not in self.names:
            known = ", ".join(self.names)
            raise ApiError(
                404, f"there is no model {name!a}; this server has {known}", param="model", code="model_not_found"
            )

    def token_strings(self, tokens: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary writes them, with Ġ for a space."""
        return [self._strings[token] for token in tokens]

    @cached_property
    def _strings(self) -> dict[int, str]:
        return {index: string for string, index in self.tokenizer.get_vocab().items()}

    def tokenizer_info(self) -> dict[str, Any]:
        """The settings of transformers' tokenizer that gives the same ids, as its tokenizer_config.json names them."""
        return {
            "tokenizer_class": "GPT2Tokenizer",
            "add_bos_token": True,
            "add_prefix_space": False,
            "bos_token": BOS_TOKEN,
            "eos_token": BOS_TOKEN,
            "model_max_length": self.max_model_len,
        }

    def token_text(self, token: int) -> str:
        r"""One token in the notation of OpenAI's log-probabilities.

        Returns:
            The token's text; `bytes:\xNN...` where its bytes are not valid UTF-8, and `token_id:N` where it has none.
        """
        raw = self.tokenizer.token_bytes(token)
        if not raw:
            return f"token_id:{token}"
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
