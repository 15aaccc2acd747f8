"""The systems that are measured: one file and one class each, all with `System`'s methods, created in child processes.

Each runs as its own documentation recommends, on the same number of threads, greedily, and past every end
of sequence, so that all generate exactly the requested number of tokens.
"""

from ..system_protocol import System
from .ctranslate2_system import CTranslate2
from .opt_megatron_system import OptMegatron
from .transformers_system import Transformers

OURS = "opt_megatron"
SYSTEMS: dict[str, type[System]] = {OURS: OptMegatron, "transformers": Transformers, "ctranslate2": CTranslate2}
# transformers has no int8 of its own on a CPU; CTranslate2's CUDA build is another package.
DTYPES: dict[str, dict[str, tuple[str, ...]]] = {  # device -> dtype -> systems
    "cpu": {"float32": tuple(SYSTEMS), "int8": (OURS, "ctranslate2")},
    "cuda": dict.fromkeys(("float32", "bfloat16", "float16"), (OURS, "transformers")) | {"int8": (OURS,)},
}
