"""PREFIX.json beside an indexed corpus: which tokenizer its ids are of."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import UserError
from ..files import read_text, write_text_atomically
from ..tokenizer import OPTTokenizer

_KEY = "tokenizer_fingerprint"


def tokenizer_record(prefix: str) -> Path:
    """The file that has the record."""
    return Path(f"{prefix}.json")


def write_tokenizer_record(prefix: str, tokenizer: OPTTokenizer) -> None:
    """Record the fingerprint of the tokenizer that made the corpus."""
    write_text_atomically(tokenizer_record(prefix), json.dumps({_KEY: tokenizer.fingerprint}) + "\n")


def check_tokenizer(prefix: str, tokenizer: OPTTokenizer) -> None:
    """Check that a corpus was made with this tokenizer. Corpora of other programs have no record and pass.

    Raises:
        UserError: it was made with another one, or the record cannot be read.
    """
    path = tokenizer_record(prefix)
    if not path.exists():
        return
    try:
        recorded = json.loads(read_text(path))[_KEY]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: is not what preprocess writes: {error}; preprocess the corpus again") from None
    if recorded != tokenizer.fingerprint:
        raise UserError(
            f"{prefix}: was made with another tokenizer than the run's, so that its ids mean other tokens: preprocess "
            "it again with --tokenizer of the model"
        )
