"""Options that are declared once, as fields of dataclasses: declaration, kinds, YAML files. Imports no torch."""

from .declaration import (
    NO_DEFAULT,
    Option,
    Options,
    check_ranges,
    convert_kinds,
    from_arguments,
    option,
    options_of,
)
from .kinds import Size

__all__ = [
    "option",
    "Option",
    "Options",
    "Size",
    "NO_DEFAULT",
    "options_of",
    "convert_kinds",
    "check_ranges",
    "from_arguments",
]
