"""What all quantised linear methods have in common."""

from __future__ import annotations

from typing import NoReturn

from ...errors import UserError
from .base import LinearMethod
from .int8_rows import Int8Rows


class QuantizedMethod(LinearMethod):
    """A linear method that keeps no float weight: made tensor by tensor while loading, with an embedding in 8 bits."""

    loads_deferred = True
    embedding_rows = Int8Rows

    def unpack(self) -> NoReturn:
        """Raises UserError: the float weight was not kept."""
        raise UserError(
            "this model was loaded with quantised weights, from which the checkpoint's weights cannot be restored: "
            "load it without quantization to read or change weights"
        )
