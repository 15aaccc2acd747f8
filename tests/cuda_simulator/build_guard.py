"""Compile device_guard.cpp against the installed torch, once, and load it; importing `installation` does both.

torch asks for what is in it while it is imported, so it must be there before. The library lies in the user's cache
folder under a name that tells torch's version and the source, so that another torch gets another one. Needs a C++20
compiler: $CXX, or else g++ or clang++. Run this file to build the library and see where.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("device_guard.cpp")


class CannotSimulate(RuntimeError):
    """There is no C++ compiler, or torch is a build for a real GPU; a test skips itself."""


def load_guard() -> None:
    """Load the library into this process.

    Raises:
        CannotSimulate: torch is a build for a real GPU, or the library was not built yet and there is no C++ compiler.
        RuntimeError: torch was imported before, or the compiler failed.
    """
    if "torch" in sys.modules:
        raise RuntimeError("import cuda_simulator.installation before torch and all that imports torch")
    library, torch_libraries = guard_library(), _torch_root() / "lib"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_libraries / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


def guard_library() -> Path:
    """The compiled library, built if there is none for this torch."""
    if (_torch_root() / "lib/libtorch_cuda.so").exists():
        raise CannotSimulate("the simulated CUDA device needs a CPU build of torch")
    version = importlib.metadata.version("torch")
    key = hashlib.sha256(_SOURCE.read_bytes() + version.encode()).hexdigest()[:12]
    library = _cache_folder() / f"device_guard-torch{version}-{key}.so"
    if not library.exists():
        _compile(library)
    return library


def _torch_root() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None:
        raise RuntimeError("torch is not installed")
    return Path(found.origin).parent


def _cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cuda_simulator"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written to
        folder = Path(tempfile.gettempdir()) / f"cuda_simulator-{os.getuid()}"
        folder.mkdir(exist_ok=True)
    return folder


def _compile(library: Path) -> None:
    root = _torch_root()
    unfinished = library.with_suffix(f".{os.getpid()}")  # several ranks may build at once
    command = [
        *(_compiler(), "-std=c++20", "-shared", "-fPIC", "-O0", "-w"),
        *(f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}", str(_SOURCE)),
        *(f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(unfinished)),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"cannot compile {_SOURCE.name} against the installed torch:\n{result.stderr[-2000:]}")
    os.replace(unfinished, library)


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise CannotSimulate("the simulated CUDA device needs a C++ compiler: install g++ or clang++, or set CXX to one")


if __name__ == "__main__":
    print(guard_library())
