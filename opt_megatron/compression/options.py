"""The options of `opt-megatron compress` and `OPT.compress`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import Options, option
from .recipe import READY

NUM_SAMPLES = 128


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(Options):
    """Which texts a compression is calibrated on, and how samples are drawn from them."""

    calibration_data: str | None = option(
        None,
        help="a text, JSON lines with a text or with tokens (windows of ids) in each, or a directory like C4's",
        metavar="FILE",
        default_text="none, for recipes that need no calibration",
        is_path=True,
    )
    calibration_samples: int | None = option(
        None, help="number of samples", minimum=1, default_text=f"{NUM_SAMPLES}; of tokens all lines"
    )
    calibration_length: int | None = option(
        None, help="tokens of a sample that is drawn from text", minimum=2, default_text="all positions of the model"
    )
    json_key: str = option("text", help="the text's key in each object", metavar="KEY")
    seed: int = option(0, help="seed of the draws", minimum=0)

    @property
    def num_samples(self) -> int:
        """How many samples are drawn from texts."""
        return NUM_SAMPLES if self.calibration_samples is None else self.calibration_samples


@dataclass(frozen=True, kw_only=True)
class SavingOptions(Options):
    """Where a compressed checkpoint is written, and how."""

    save: str = option(help="directory to write", metavar="DIR", required=True, is_path=True)
    recipe: str = option(
        help=f'{", ".join(READY)}, a YAML file, or the steps, as \'[{{"quantize": {{"bits": 4}}}}]\'',
        metavar="RECIPE",
        required=True,
    )
    to: str = option(
        "hf",
        help="hf: weights as floats, which every program loads; gptq: packed integers in GPTQ's published layout",
        choices=("hf", "gptq"),
    )
    dtype: str | None = option(
        None, help="of the floats that are written: float32, float16 or bfloat16", default_text="the checkpoint's"
    )
    force: bool = option(False, help="replace the directory if it is a checkpoint already")
    resume: bool = option(False, help="continue what an interrupted run with the same options has written")
