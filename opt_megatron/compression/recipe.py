"""Recipes: which steps a compression consists of, and their settings. Imports no torch.

A recipe is a list of steps in this order, each at most once:

    [{"smooth": {"alpha": 0.5}}, {"prune": {"method": "sparsegpt", "sparsity": 0.5}}, {"quantize": {"bits": 4}}]

given as JSON or YAML, in a file, or by the name of one of `READY`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import OPTConfig
from ..errors import UserError, shorten
from ..options import Options, option, options_of
from ..options.kinds import shown
from ..options.yaml_file import parse_yaml, read_yaml_file

WHOLE_ROW = -1  # group size of one grid a row
BLOCK_COLUMNS = 128  # columns that GPTQ and SparseGPT treat together
_PATTERN = re.compile(r"(\d{1,3}):(\d{1,3})")


def _check_pattern(pattern: str) -> None:
    match = _PATTERN.fullmatch(pattern)
    zeros, group = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < zeros < group or BLOCK_COLUMNS % group:
        raise UserError(
            f"pattern is {shown(pattern)}, but must be n:m with n below m, and m a power of two up to {BLOCK_COLUMNS}"
        )


@dataclass(frozen=True, kw_only=True)
class Smooth(Options):
    """SmoothQuant: move the range of a layer's inputs into its weights; the model's function stays the same."""

    alpha: float = option(0.5, help="share of the inputs' range that is moved", minimum=0, maximum=1)


@dataclass(frozen=True, kw_only=True)
class Prune(Options):
    """Set weights to zero: a share of them (`sparsity`), or n of every m neighbouring inputs (`pattern`)."""

    method: str = option("sparsegpt", help="how weights are chosen", choices=("magnitude", "wanda", "sparsegpt"))
    sparsity: float | None = option(None, help="share of zeros in every matrix", above=0, below=1)
    pattern: str | None = option(None, help="n:m, n zeros in every m neighbouring inputs, as 2:4")
    damping: float = option(0.01, help="of SparseGPT: share of the Hessian's mean diagonal added to it", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.sparsity is None) == (self.pattern is None):
            raise UserError("give one of sparsity (as 0.5) and pattern (as 2:4)")
        if self.pattern is not None:
            _check_pattern(self.pattern)

    @property
    def zeros_in_group(self) -> tuple[int, int] | None:
        """(n, m) of a pattern; None where a share is pruned."""
        if self.pattern is None:
            return None
        zeros, group = self.pattern.split(":")
        return int(zeros), int(group)


@dataclass(frozen=True, kw_only=True)
class Quantize(Options):
    """Round weights to a grid of 2^bits values in every row, or in every group of a row's inputs."""

    method: str = option(
        "gptq",
        help="how weights are rounded: gptq, rtn (to nearest), or absmax, to nearest on the symmetric grid of int8 "
        "kernels, which has no value for the lowest code",
        choices=("rtn", "gptq", "absmax"),
    )
    bits: int = option(4, help="bits of a weight", choices=(2, 3, 4, 8))
    group_size: int = option(WHOLE_ROW, help="inputs that share a grid; -1: a whole row")
    symmetric: bool = option(False, help="grids around zero")
    act_order: bool = option(False, help="of GPTQ: columns with large inputs first")
    static_groups: bool = option(False, help="of GPTQ: the grids of all groups from the weights before the first step")
    damping: float = option(0.01, help="of GPTQ: share of the Hessian's mean diagonal added to it", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 1 and self.group_size != WHOLE_ROW:
            raise UserError(f"group_size is {self.group_size}, but must be at least 1, or -1 for whole rows")
        if self.method != "gptq" and (self.act_order or self.static_groups):
            raise UserError(f"act_order and static_groups belong to gptq: {self.method} rounds every weight by itself")
        if self.static_groups and self.group_size == WHOLE_ROW:
            raise UserError("static_groups needs a group_size")


Step = Smooth | Prune | Quantize
_STEPS: dict[str, type[Step]] = {"smooth": Smooth, "prune": Prune, "quantize": Quantize}  # in their order


@dataclass(frozen=True)
class Recipe:
    """The steps of a compression; None where there is no such step.

    Raises:
        UserError: there is no step, or two contradict each other.
    """

    smooth: Smooth | None = None
    prune: Prune | None = None
    quantize: Quantize | None = None

    def __post_init__(self) -> None:
        if self.smooth is None and self.prune is None and self.quantize is None:
            raise UserError(f"the recipe has no step; there are {', '.join(_STEPS)}")
        if self._prunes_by("sparsegpt") and self.quantize is not None and self.quantize.act_order:
            raise UserError(
                "act_order cannot be combined with sparsegpt, which goes through the columns in their order"
            )

    def _prunes_by(self, method: str) -> bool:
        return self.prune is not None and self.prune.method == method

    @property
    def needs_hessian(self) -> bool:
        """Whether a step needs the second moments of the inputs."""
        return self._prunes_by("sparsegpt") or (self.quantize is not None and self.quantize.method == "gptq")

    @property
    def damping(self) -> float:
        """Of the Hessian: GPTQ's, or SparseGPT's where there is no GPTQ."""
        if self.quantize is not None and self.quantize.method == "gptq":
            return self.quantize.damping
        assert self.prune is not None, "no step needs a Hessian"
        return self.prune.damping

    @property
    def needs_inputs(self) -> bool:
        """Whether a step needs statistics of the inputs of layers that follow compressed ones."""
        return self.needs_hessian or self._prunes_by("wanda")

    @property
    def needs_samples(self) -> bool:
        """Whether calibration samples are needed at all."""
        return self.needs_inputs or self.smooth is not None

    def check_fits(self, config: OPTConfig) -> None:
        """Raise UserError unless the pattern of a pruning divides the inputs of a model's linears."""
        group = self.prune.zeros_in_group if self.prune is not None else None
        for size, what in ((config.hidden_size, "hidden_size"), (config.ffn_hidden_size, "ffn_hidden_size")):
            if group is not None and size % group[1]:
                raise UserError(
                    f"the pattern {group[0]}:{group[1]} does not divide the model's {what} of {size}: use another "
                    "pattern, or a sparsity"
                )

    def steps(self) -> Iterator[tuple[str, Step]]:
        """The names and settings of the steps that there are, in their order."""
        for name in _STEPS:
            step = getattr(self, name)
            if step is not None:
                yield name, step

    def to_list(self) -> list[dict[str, dict[str, Any]]]:
        """The recipe as JSON has it, all settings given."""
        return [
            {name: {key: value for key, value in asdict(step).items() if value is not None}}
            for name, step in self.steps()
        ]


READY: dict[str, Recipe] = {
    "int8": Recipe(quantize=Quantize(method="absmax", bits=8)),
    "int8-smooth": Recipe(smooth=Smooth(), quantize=Quantize(method="absmax", bits=8)),
    "rtn4-g128": Recipe(quantize=Quantize(method="rtn", group_size=128)),
    "gptq4": Recipe(quantize=Quantize()),
    "gptq4-g128": Recipe(quantize=Quantize(group_size=128)),
    "gptq3": Recipe(quantize=Quantize(bits=3)),
    "gptq3-g128": Recipe(quantize=Quantize(bits=3, group_size=128)),
    "magnitude50": Recipe(prune=Prune(method="magnitude", sparsity=0.5)),
    "wanda50": Recipe(prune=Prune(method="wanda", sparsity=0.5)),
    "wanda-2:4": Recipe(prune=Prune(method="wanda", pattern="2:4")),
    "sparsegpt50": Recipe(prune=Prune(sparsity=0.5)),
    "sparsegpt-2:4": Recipe(prune=Prune(pattern="2:4")),
    "sparsegpt50-gptq4": Recipe(prune=Prune(sparsity=0.5), quantize=Quantize()),
    "sparsegpt-2:4-gptq4": Recipe(prune=Prune(pattern="2:4"), quantize=Quantize()),
}


def find_recipe(given: str | Recipe | Mapping[str, Any] | Sequence[Any]) -> Recipe:
    """The recipe of a ready name, a YAML file, or the steps themselves, as text or as Python's lists.

    Raises:
        UserError: there is no such recipe, or a step or a setting is wrong.
    """
    if isinstance(given, Recipe):
        return given
    if not isinstance(given, str):
        return parse_recipe(given)
    text = given.strip()
    if text in READY:
        return READY[text]
    if text.startswith(("[", "{")):
        return parse_recipe(parse_yaml(text, "--recipe"), "--recipe")
    if Path(text).suffix.lower() in (".yaml", ".yml", ".json"):
        return parse_recipe(read_yaml_file(Path(text)), text)
    raise UserError(
        f"--recipe {shown(text)} is no ready recipe ({', '.join(READY)}), no YAML file, and no list of steps such as "
        '[{"quantize": {"bits": 4}}]'
    )


def parse_recipe(steps: Any, where: str = "the recipe") -> Recipe:
    """The recipe of a list of steps, each a mapping with the step's name, or of one mapping.

    Args:
        where: what messages begin with.

    Raises:
        UserError: a step is unknown, there twice or in the wrong place, or has a wrong setting.
    """
    made: dict[str, Step] = {}
    for name, settings in _named_steps(steps, where):
        if name not in _STEPS:
            raise UserError(f"{where}: there is no step {shown(name)}; there are {', '.join(_STEPS)}")
        if name in made:
            raise UserError(f"{where}: {name} is there twice")
        later = [done for done in made if list(_STEPS).index(done) > list(_STEPS).index(name)]
        if later:
            raise UserError(f"{where}: {name} comes after {later[0]}; the order is {', '.join(_STEPS)}")
        made[name] = _step(name, settings, where)
    try:
        return Recipe(**made)  # type: ignore[arg-type]  # each name has its own class
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _named_steps(steps: Any, where: str) -> Iterator[tuple[str, Any]]:
    items = [steps] if isinstance(steps, Mapping) else steps
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise UserError(f"{where} is {shown(steps)}, but must be a list of steps")
    for item in items:
        if not isinstance(item, Mapping):
            raise UserError(f"{where}: {shown(item)} is no step; write {{name: {{setting: value}}}}")
        yield from item.items()


def _step(name: str, settings: Any, where: str) -> Step:
    kind = _STEPS[name]
    values = {} if settings is None else settings
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: {name} is {shown(settings)}, but must be settings with their values")
    unknown = [str(key) for key in values if key not in options_of(kind)]
    if unknown:
        known = ", ".join(options_of(kind))
        raise UserError(f"{where}: {name} has no setting {shorten(unknown, 3)}; it has {known}")
    try:
        return kind(**_with_pattern(dict(values)))
    except UserError as error:
        raise UserError(f"{where}: {name}: {error}") from None


def _with_pattern(values: dict[str, Any]) -> dict[str, Any]:
    """The settings with a sparsity such as 2:4 as the pattern that it is."""
    sparsity = values.get("sparsity")
    if isinstance(sparsity, str) and _PATTERN.fullmatch(sparsity) and "pattern" not in values:
        del values["sparsity"]
        values["pattern"] = sparsity
    return values
