"""Packaging of opt_megatron (ruff and pytest are configured in pyproject.toml)."""

import platform
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
VERSION = (HERE / "opt_megatron" / "version.py").read_text().split('"')[-2]

SERVE = ["fastapi>=0.115", "uvicorn>=0.54,<0.55", "h11>=0.16,<1", "prometheus-client>=0.20"]
BENCH = ["ctranslate2>=4.8.5", "matplotlib>=3.8", "transformers>=4.56"]
EVAL = ["lm-eval>=0.4.13"]
PLOT = ["matplotlib>=3.8"]
TRAIN = ["tensorboard>=2.16.2", *PLOT]
DOCS = ["sphinx>=8", "myst-nb>=1.2", "pydata-sphinx-theme>=0.16"]
TEST = ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "transformers>=4.56", "openai>=1.60", "selenium>=4.20"]
TEST += ["peft>=0.21", "ruff>=0.17", "mypy>=2.4", "types-PyYAML>=6.0.12", "httpx>=0.27", *SERVE, *TRAIN, *DOCS]
DEV = ["pre-commit>=4.7", *TEST]

# The instruction sets that the CPU kernels are compiled for, and the compiler's options for each.
INSTRUCTION_SETS = {"base": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = ["-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS["avx512"] += [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")]
KERNEL_OPTIONS = ["-O3", "-g0", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden"]
KERNEL_OPTIONS += ["-Wno-psabi", "-Wno-maybe-uninitialized"]  # the latter in GCC's own headers


class BuildCPUKernels(build_ext):
    """Compiles csrc/ where there is a compiler; the package runs without it, by torch's own products."""

    def build_extension(self, extension: Extension) -> None:
        """A shared library that links to no OpenMP: it uses the one that torch has loaded."""
        try:
            objects = self._compile(extension.sources[:1], "library", ["-fvisibility=default"])
            for name, options in INSTRUCTION_SETS.items():
                objects += self._compile(extension.sources[1:], name, [f"-DKERNELS={name}", *options])
            self.compiler.link_shared_object(objects, self.get_ext_fullpath(extension.name), target_lang="c++")
        except Exception as error:  # of any compiler, or none
            print(f"the CPU kernels are not built, torch's own products are used instead: {error}")

    def _compile(self, sources: list[str], name: str, options: list[str]) -> list[str]:
        directory = str(Path(self.build_temp) / name)
        return self.compiler.compile(sources, output_dir=directory, extra_postargs=[*KERNEL_OPTIONS, *options])


setup(
    name="opt-megatron",
    version=VERSION,
    description="Run, convert, train, serve and study Meta's OPT language models on Megatron-core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["opt_megatron", "opt_megatron.*"]),  # without benchmarks/ and tests/
    ext_modules=[
        Extension(
            "opt_megatron.model._cpu_kernels",
            sources=["csrc/library.cpp", "csrc/linear.cpp", "csrc/attention.cpp", "csrc/normal.cpp"],
            depends=["csrc/kernels.h", "csrc/scratch.h", "csrc/vector.h"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildCPUKernels},
    package_data={
        "opt_megatron": ["py.typed", "assets/*/*", "serving/assets/*", "evaluation/tasks/*"],
    },
    # The registry's package named "apex" is unrelated to NVIDIA's and must never be listed here: NVIDIA's
    # Apex is found at run time when the user has built it (docs/guides/multi_gpu.md).
    install_requires=[
        "torch>=2.11,<2.15",
        "megatron-core>=0.16.1,<0.20",
        "numpy>=1.26",
        "regex>=2024.4.16",
        "safetensors>=0.4.3",
        "tokenizers>=0.22",
        "huggingface_hub>=0.34",
        "psutil>=5.9.5",
        "pyyaml>=6.0.1",
        "tqdm>=4.66",
        "xxhash>=3.4",
    ],
    extras_require={
        "serve": SERVE,
        "train": TRAIN,
        "eval": EVAL,
        "plot": PLOT,
        "bench": BENCH,
        "docs": DOCS,
        "test": TEST,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["opt-megatron = opt_megatron.cli:main"]},
)
