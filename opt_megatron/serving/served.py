"""What is served: an engine with its tokenizer, under the names that clients know it by."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import OPTConfig
from ..generation.core.engine import Engine
from ..tokenizer import OPTTokenizer
from .errors import ApiError


@dataclass(frozen=True)
class ServedModel:
    """A model that is ready.

    Attributes:
        names: the first is what answers carry.
    """

    engine: Engine
    tokenizer: OPTTokenizer
    config: OPTConfig
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """What answers carry."""
        return self.names[0]

    @property
    def positions(self) -> int:
        """Tokens of prompt and output together, at the most."""
        return self.config.max_position_embeddings

    def check_name(self, name: str | None) -> None:
        """Raise ApiError (404) unless the model has this name; None is any."""
        if name is not None and name not in self.names:
            known = ", ".join(self.names)
            raise ApiError(
                404, f"there is no model {name!a}; this server has {known}", param="model", code="model_not_found"
            )

    def token_text(self, token: int) -> str:
        """A token by itself, as OpenAI's log-probabilities write it: one that is no whole text as its bytes."""
        raw = self.tokenizer.token_bytes(token)
        if not raw:
            return f"token_id:{token}"
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
