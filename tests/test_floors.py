"""The floors of docs/architecture.md, read from the source: who may import whom, and file hygiene.

Each rule is a function over parsed source, so that the self-tests at the end can show it a
violation and see it caught.
"""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

import pytest

PACKAGE = "vqmoe_megatron"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE
MAX_LINES = 400
LONGER = {"hf/modeling_vqmoe.py"}  # one file, since it travels alone into an exported model
CPU_COMPAT = "runtime/cpu_compat/"  # the only folder that may change modules of others

# Where each top-level module or folder lives. A new one fails until it is given a floor here.
FLOORS = {
    "__init__": 0,
    "registry": 0,
    "config": 0,
    "rundir": 0,
    "metrics": 0,
    "plan": 0,
    "vq": 1,
    "moe": 2,
    "runtime": 2,
    "launch": 3,
    "data": 3,
    "engines": 3,
    "tasks": 3,
    "checkpoint": 3,
    "hf": 3,
    "track": 3,
    "train": 3,
    "analysis": 3,
    "simulate": 3,
    "study": 3,
    "bench": 3,
    "upcycle": 3,
    "finetune": 3,
    "gpu_proof": 4,
    "cli": 4,
}
# Folders of one floor that may import another of the same floor; must stay without cycles.
SIDEWAYS = {
    "config": {"registry", "rundir"},
    "metrics": {"registry"},
    "plan": {"config"},
    "moe": {"runtime"},
    # reads metrics.jsonl; measures checkpoints of the recipe's task on a page like a study's
    "analysis": {"bench", "checkpoint", "data", "engines", "study", "tasks", "track"},
    "bench": {"launch"},
    "tasks": {"data"},
    "engines": {"tasks"},  # what a batch is
    "checkpoint": {"engines"},
    "hf": {"checkpoint", "data", "engines"},  # a checkpoint and its tokenizer in another form
    "simulate": {"engines", "tasks"},  # the step that is counted is the trainer's own
    # bench: a report states its machine and commit as every measured result does
    "study": {"bench", "data", "launch", "track"},
    # what it writes is a run, measured as runs are
    "upcycle": {"checkpoint", "data", "engines", "tasks", "train"},
    # runs of one checkpoint, with intervals as a study has them
    "finetune": {"checkpoint", "data", "study", "train"},
    "train": {"analysis", "checkpoint", "data", "engines", "launch", "tasks", "track"},
}
# Third-party packages by floor; from floor 3 up anything goes.
THIRD_PARTY = {
    0: {"omegaconf", "yaml"},  # yaml: OmegaConf's own parser
    1: {"omegaconf", "yaml", "torch", "triton"},
    2: {"omegaconf", "yaml", "torch", "triton", "numpy", "megatron"},
}
# Single files that need one package more than their floor, each with its reason.
THIRD_PARTY_EXTRA = {
    # prints its report as a table before any rank starts; tries whether the import succeeds
    "runtime/doctor.py": {"rich", "transformer_engine"},
    # prints commands' tables
    "runtime/table_console.py": {"rich"},
    # reads safetensors; nothing else
    "vq/table_layer.py": {"safetensors"},
    "vq/memory_tables.py": {"safetensors"},
}
FOREIGN_NAMES = {"utils", "dist", "types", "logging"}


def module_unit(path: str) -> str:
    """Return the row of FLOORS that a path below the package belongs to."""
    return Path(path).parts[0].removesuffix(".py")


def imported_modules(tree: ast.Module) -> list[tuple[int, str]]:
    """Return (line, dotted name) of every import, anywhere; ``from a import b`` is a.b."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            found += [(node.lineno, f"{source}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = node.func.id if isinstance(node.func, ast.Name) else name
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return found


def import_violations(path: str, tree: ast.Module) -> list[str]:
    """Return one line per import that reaches up, sideways without leave, or out of its floor."""
    unit = module_unit(path)
    floor = FLOORS[unit]
    allowed = THIRD_PARTY.get(floor, set()) | THIRD_PARTY_EXTRA.get(path, set())
    problems: list[str] = []
    for line, name in imported_modules(tree):
        top, _, rest = name.partition(".")
        where = f"{path}:{line} imports {name}"
        if name.startswith("."):
            problems.append(f"{where}: relative imports are not used here")
        elif top == PACKAGE:
            target = rest.split(".")[0] or "__init__"
            target = target if target in FLOORS else "__init__"  # a name, such as __version__
            if FLOORS[target] > floor:
                problems.append(f"{where}: floor {FLOORS[target]} is above floor {floor}")
            elif FLOORS[target] == floor and target not in {unit, "__init__"}:
                if target not in SIDEWAYS.get(unit, ()):
                    problems.append(f"{where}: {unit} may not import its neighbour {target}")
        elif floor < 3 and top not in sys.stdlib_module_names and top not in allowed:
            problems.append(f"{where}: floor {floor} may not use {top}")
        elif floor < 2 and name.startswith("torch.distributed"):
            problems.append(f"{where}: nothing below floor 2 communicates")
    return problems


def root_name(node: ast.expr) -> str | None:
    """Return ``a`` of ``a.b[c].d``; None when the chain starts with a call or a literal."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def patch_violations(path: str, tree: ast.Module) -> list[str]:
    """Return one line per assignment into a module or class that was imported, and per mock.

    Approximate: follows names bound by imports, not values. ``torch.backends`` holds settings.
    """
    foreign: set[str] = set()
    problems: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                source = getattr(node, "module", None) or alias.name
                if (
                    source.startswith("unittest.mock")
                    or f"{source}.{alias.name}" == "unittest.mock"
                ):
                    problems.append(f"{path}:{node.lineno} mocks")
                if source.split(".")[0] in ("torch", "megatron", PACKAGE):
                    foreign.add(alias.asname or alias.name.split(".")[0])
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = [t for t in node.targets for t in getattr(t, "elts", [t])]
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("setattr", "delattr") and node.args:
                targets = [ast.Attribute(node.args[0], "?", ast.Store())]
        for target in targets:
            written = ast.unparse(target)
            is_module = root_name(target) in foreign or written.startswith("sys.modules[")
            if not isinstance(target, ast.Name) and is_module:
                if not written.startswith("torch.backends."):
                    problems.append(f"{path}:{node.lineno} changes {written}")
    return problems


def sources() -> list[str]:
    """Return every Python file of the package, as paths below it."""
    return sorted(str(file.relative_to(ROOT)) for file in ROOT.rglob("*.py"))


@functools.cache
def parsed(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=path)


def test_the_scan_sees_the_package() -> None:
    assert {"config/recipe.py", "registry.py", "plan/layout.py", "vq/__init__.py"} <= set(sources())


def test_every_file_and_folder_has_a_floor() -> None:
    assert {module_unit(path) for path in sources()} - set(FLOORS) == set()


def test_every_folder_of_python_files_is_a_package() -> None:
    folders = {(ROOT / path).parent for path in sources()}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_files_keep_to_their_floors() -> None:
    assert [p for path in sources() for p in import_violations(path, parsed(path))] == []


def test_only_the_cpu_layer_changes_torch_or_megatron() -> None:
    others = [path for path in sources() if not path.startswith(CPU_COMPAT)]
    assert [p for path in others for p in patch_violations(path, parsed(path))] == []


def test_files_are_short_documented_and_well_named() -> None:
    num_lines = {path: len((ROOT / path).read_text().splitlines()) for path in sources()}
    too_long = {path for path, n in num_lines.items() if n > MAX_LINES}
    assert too_long == LONGER  # one idea per file
    names = {path: {part.removesuffix(".py") for part in Path(path).parts} for path in sources()}
    assert [path for path in sources() if names[path] & FOREIGN_NAMES] == []
    written = [path for path in sources() if num_lines[path]]
    assert [path for path in written if not ast.get_docstring(parsed(path))] == []


def test_sideways_imports_stay_on_one_floor_without_cycles() -> None:
    for unit, targets in SIDEWAYS.items():
        assert {FLOORS[target] for target in targets} == {FLOORS[unit]}
    remaining = dict(SIDEWAYS)
    while remaining:
        free = [unit for unit, targets in remaining.items() if targets.isdisjoint(remaining)]
        assert free, f"cycle among {sorted(remaining)}"
        for unit in free:
            del remaining[unit]


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("plan/x.py", "import torch", "floor 0 may not use torch"),
        ("config/x.py", "from megatron.core import parallel_state", "may not use megatron"),
        ("plan/x.py", "def f():\n    import torch.nn", "plan/x.py:2"),
        ("vq/x.py", "import torch.distributed as dist", "nothing below floor 2"),
        ("vq/x.py", "from torch import distributed", "nothing below floor 2"),
        ("vq/x.py", "import importlib\nimportlib.import_module('megatron.core')", "megatron"),
        ("vq/x.py", "from vqmoe_megatron.moe import layer", "floor 2 is above floor 1"),
        ("vq/x.py", "from vqmoe_megatron import moe", "floor 2 is above floor 1"),
        ("runtime/x.py", "import vqmoe_megatron.moe.layer", "may not import its neighbour moe"),
        ("data/x.py", "import vqmoe_megatron.cli", "floor 4 is above floor 3"),
        ("moe/x.py", "from .router import VQRouter", "relative imports"),
    ],
)
def test_import_violation_is_caught(path: str, source: str, expected: str) -> None:
    (problem,) = import_violations(path, ast.parse(source))
    assert expected in problem


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("plan/x.py", "from vqmoe_megatron.config import RunConfig\nimport math, omegaconf"),
        ("vq/x.py", "import torch\nfrom vqmoe_megatron import __version__"),
        ("moe/x.py", "import torch.distributed\nfrom megatron.core import parallel_state"),
        ("train/x.py", "import mlflow, vqmoe_megatron.data.x, vqmoe_megatron.moe"),
    ],
)
def test_legal_imports_pass(path: str, source: str) -> None:
    assert import_violations(path, ast.parse(source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.cuda.current_device = lambda: 'cpu'",
        "from unittest import mock\nmock.patch.object(a, 'b', c)",
        "import unittest.mock\nunittest.mock.patch('a.b')",
        "from unittest.mock import patch\npatch('a.b')",
        "import sys\nsys.modules['torch'] = object()",
        "from vqmoe_megatron.moe import layer\nlayer.dispatch = None",
        "from vqmoe_megatron.moe import layer\nlayer.TABLE['a'] = None",
        "import torch\nsetattr(torch.cuda, 'current_device', None)",
        "import torch.nn.functional as F\nF.relu = None",
        "from megatron.core.transformer.moe import moe_utils\nmoe_utils.te_general_gemm = None",
        "from megatron.core.models.gpt import GPTModel\nx, GPTModel.forward = 1, None",
        "import megatron.core\ndel megatron.core.parallel_state",
    ],
)
def test_patch_is_caught(source: str) -> None:
    assert len(patch_violations("moe/x.py", ast.parse(source))) == 1


def test_own_attributes_are_no_patch() -> None:
    source = (
        "import torch\nparam = torch.zeros(1)\nparam.allreduce = False\n"
        "setattr(param, 'x', 1)\nself.weight = param\ntorch.backends.cudnn.benchmark = True\n"
    )
    assert patch_violations("moe/x.py", ast.parse(source)) == []
