"""Imports keep one direction: a module imports modules of lower layers and of its own package only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "opt_megatron"
# From the lowest layer to the highest; the packages and modules of one layer do not import each other.
LAYERS = (
    {"version", "errors"},
    {"files"},
    {"added_tokens", "config", "options", "philox"},
    {"parallel", "tokenizer"},
    {"data", "model"},
    {"checkpoint"},
    {"generation", "training"},
    {"pretrained", "weights", "inputs"},
    {"loaded_model", "saving", "compression"},
    {"api"},
    {"analysis", "evaluation", "flagai", "serving"},
    {"cli"},
    {"__init__", "__main__"},
)
GENERATION_LAYERS = ({"engine_options", "sampling"}, {"generation_config", "request", "step"}, {"decoding"}, {"core"})
# Modules that import neither torch nor Megatron-core, so that --help and the checks of arguments are instant.
WITHOUT_TORCH = ("cli", "options", "config", "checkpoint.conversion_options", "checkpoint.formats.registry",
                 "checkpoint.memory_estimate", "generation.sampling.sampling_params", "model.linear_methods.registry",
                 "training.options", "training.run_file", "compression.recipe", "compression.options",
                 "data.jsonl", "data.options", "parallel.launch_environment",
                 "parallel.layout")  # fmt: skip


def imported_modules(path: Path) -> Iterator[str]:
    """Full names of the package's modules that a file imports, those within functions included."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    tree = ast.parse(path.read_text(encoding="utf-8"))
    only_for_types = {id(node) for block in ast.walk(tree) if _is_type_checking(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in only_for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import evaluator` names modules, `from .evaluator import x` one module.
            yield from (f"{module}.{alias.name}" for alias in node.names) if not node.module else (module,)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def upward_imports(package: str, layers: tuple[set[str], ...]) -> list[str]:
    """A sentence for every import within `package` that does not go to a lower layer."""
    rank = {name: number for number, layer in enumerate(layers) for name in layer}
    directory = ROOT.joinpath(*package.split("."))
    found = []
    for path in sorted(directory.rglob("*.py")):
        own = path.relative_to(directory).with_suffix("").parts[0]
        for module in imported_modules(path):
            if not module.startswith(f"{package}."):
                continue
            other = module.removeprefix(f"{package}.").split(".")[0]
            if other != own and rank[other] >= rank[own]:
                found.append(f"{path.relative_to(ROOT)} imports {module}")
    return found


@pytest.mark.parametrize(("package", "layers"), [(PACKAGE, LAYERS), (f"{PACKAGE}.generation", GENERATION_LAYERS)])
def test_layers(package, layers):
    declared = set().union(*layers)
    directory = ROOT.joinpath(*package.split("."))
    here = {path.stem for path in directory.glob("*.py")} | {
        path.parent.name for path in directory.glob("*/__init__.py")
    }
    assert here - {"__init__"} == declared - {"__init__"}, "a module has no layer, or a layer names none"
    assert upward_imports(package, layers) == []


def test_package_imports_nothing_from_benchmarks_or_tests():
    modules = {module.split(".")[0] for path in (ROOT / PACKAGE).rglob("*.py") for module in imported_modules(path)}
    assert not modules & {"benchmarks", "tests", "tools"}


def test_commands_and_options_import_no_torch():
    commands = [f"cli.{path.stem}" for path in (ROOT / PACKAGE / "cli").glob("*.py") if path.stem != "__init__"]
    names = ", ".join(f"{PACKAGE}.{name}" for name in (*WITHOUT_TORCH, *commands))
    code = f"import sys, {names}; print([name for name in ('torch', 'megatron') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_commands_on_files_import_no_megatron_core(tmp_path):
    """Convert, inspect and verify read and write Megatron's files without it: it takes a second to import."""
    code = f"""
import sys
from {PACKAGE}.cli import main
from {PACKAGE}.checkpoint.locate import EMBEDDED_DIRECTORY
source, target = str(EMBEDDED_DIRECTORY), sys.argv[1]
for command in (
    ["convert", "--load", source, "--save", target, "--tensor-model-parallel-size", "2", "--no-fsync"],
    ["inspect", target],
    ["verify", target],
    ["verify", source, target],
):
    try:
        main(command)
    except SystemExit as ended:
        assert ended.code == 0, command
    assert not [name for name in sys.modules if name.split(".")[0] == "megatron"], command
"""
    command = [sys.executable, "-c", code, str(tmp_path / "converted")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_importing_the_model_is_silent_and_patches_nothing():
    """The patches of Megatron-core are made by `init_parallel`, for the device that it chooses."""
    code = f"""
import torch
cuda = torch.Tensor.cuda, torch.cuda.current_device, torch.cuda.is_available
import {PACKAGE}.model.opt_model, {PACKAGE}.training.train, {PACKAGE}.parallel.core_compat as compat
from megatron.core.tensor_parallel import mappings
assert (torch.Tensor.cuda, torch.cuda.current_device, torch.cuda.is_available) == cuda
assert not compat._patches and mappings.torch is torch
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
