"""The logit lens: which token each layer would predict (nostalgebraist 2020, "interpreting GPT: the logit lens").

Every layer's residual stream goes through the final norm and the head, as if the layers above were not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..api import OPT
from ..errors import MissingPackageError, UserError
from ..files import atomic_file
from ..inputs import Tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL = (0.85, 0.32)  # inches


@dataclass(frozen=True)
class Lens:
    """What each layer predicts after each token of one sequence.

    Attributes:
        tokens: [s] the input ids.
        best: [num_layers + 1, s] the likeliest next id after each token; the first row is the embedding's.
        probabilities: [num_layers + 1, s] of these ids.
    """

    tokens: tuple[int, ...]
    best: tuple[tuple[int, ...], ...]
    probabilities: tuple[tuple[float, ...], ...]


def logit_lens(opt: OPT, tokens: Tokens) -> Lens:
    """The logit lens of one sequence; called on every rank. The last row is the model's own prediction.

    Raises:
        UserError: the tokens do not fit the model, or are more than one sequence.
    """
    last = opt.config.num_layers
    hidden = opt.hidden_states(tokens, range(last))
    if hidden[0].size(0) != 1:
        raise UserError(f"the lens looks at one sequence, not at {hidden[0].size(0)}")
    best, probabilities = [], []
    for number in range(last + 1):  # not all at once: logits are as wide as the vocabulary
        logits = opt.unembed(hidden[number]) if number < last else opt.logits(tokens)
        scores = logits[0].float().softmax(-1)
        value, index = scores.max(-1)
        best.append(tuple(index.tolist()))
        probabilities.append(tuple(value.tolist()))
    return Lens(tuple(torch.as_tensor(tokens).flatten().tolist()), tuple(best), tuple(probabilities))


def draw(lens: Lens, opt: OPT, path: Path, *, last: int | None = None, title: str = "") -> None:
    """Write a PNG: a row for each layer, the embedding at the bottom, and a column for each input token.

    Args:
        last: number of tokens that are shown, the last ones; None for all.

    Raises:
        UserError: matplotlib is missing, the file cannot be written, or `last` is below 1.
    """
    if last is not None and last < 1:
        raise UserError(f"last is {last}, but must be at least 1")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("matplotlib", "drawing", "plot") from None
    begin = 0 if last is None else max(0, len(lens.tokens) - last)
    read = lens.tokens[begin:]
    rows, columns = len(lens.best), len(read)
    figure = Figure(figsize=(1.8 + _CELL[0] * columns, 1.2 + _CELL[1] * rows), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(
        [row[begin:] for row in lens.probabilities], origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1
    )
    for row in range(rows):
        for column in range(columns):
            colour = "white" if lens.probabilities[row][begin + column] > 0.6 else "black"
            text = label(opt, lens.best[row][begin + column])
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour, parse_math=False)
    axes.set_xticks(range(columns), [label(opt, token) for token in read], rotation=60, ha="right", fontsize=7)
    for tick in axes.get_xticklabels():
        tick.set_parse_math(False)
    axes.set_yticks(range(rows), ["embedding", *(f"layer {number}" for number in range(rows - 1))], fontsize=7)
    axes.set_xlabel("token read", fontsize=8)
    axes.set_title(title or "likeliest next token, by layer", fontsize=9, parse_math=False)
    bar = figure.colorbar(shown, ax=axes)
    bar.set_label("its probability", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    _save(figure, path)


def label(opt: OPT, token: int) -> str:
    """A token's text with visible spaces and line ends, `</s>` for the end of sequence; at most ten characters."""
    text = opt.tokenizer.decode([token], skip_special_tokens=False)
    text = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return text if len(text) <= 10 else text[:9] + "…"


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
