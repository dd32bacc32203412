"""The floors of docs/architecture.md, read from the source: who may import whom, and file hygiene.

Each rule is a function over parsed source, so that the self-tests at the end can show it a
violation and see it caught.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = "vqmoe_megatron"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE
MAX_LINES = 400
CPU_COMPAT = "runtime/cpu_compat.py"  # the only file that may change torch or megatron

# Where each top-level module or folder lives. A new one fails until it is given a floor here.
FLOORS = {
    "__init__": 0,
    "config": 0,
    "config_checks": 0,
    "own_outputs": 0,
    "config_ranges": 0,
    "config_texts": 0,
    "config_types": 0,
    "recipe_text": 0,
    "vq_config": 0,
    "recipe": 0,
    "plan": 0,
    "vq": 1,
    "moe": 2,
    "runtime": 2,
    "bench": 3,
    "data": 3,
    "training": 3,
    "tracking": 3,
    "analysis": 3,
    "studies": 3,
    "simulate": 3,
    "plan_tables": 3,
    "plan_commands": 3,
    "cli": 4,
}
# Folders of one floor that may import another of the same floor; must stay without cycles.
SIDEWAYS = {
    "config_ranges": {"config_types"},
    "config_checks": {"config_ranges", "config_texts", "config_types"},
    "vq_config": {"config_checks"},
    "config": {"config_checks", "vq_config"},
    "recipe": {"config", "config_checks", "config_types", "own_outputs", "recipe_text"},
    "plan": {"config", "config_ranges"},
    "moe": {"runtime"},
    "analysis": {"data", "tracking"},  # metric names live in tracking's one table
    "training": {"analysis", "data", "tracking"},
    # simulate: the step that is counted is the trainer's own
    "simulate": {"training"},
    # the command: a corpus tells its vocabulary, a simulated step is laid beside the plan
    "plan_tables": {"simulate"},
    "plan_commands": {"data", "plan_tables", "simulate"},
    # bench: a report states its machine and commit as every measured result does
    "studies": {"analysis", "bench", "data", "tracking", "training"},
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
    # reads safetensors; nothing else
    "vq/table_layer.py": {"safetensors"},
}
FOREIGN_NAMES = {"utils", "dist", "types", "logging", "megatron"}


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
    """Return one line per assignment into a torch or megatron module or class.

    Approximate: follows names bound by imports, not values. ``torch.backends`` holds settings.
    """
    foreign: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                source = getattr(node, "module", None) or alias.name
                if source.split(".")[0] in ("torch", "megatron"):
                    foreign.add(alias.asname or alias.name.split(".")[0])
    problems: list[str] = []
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
            if not isinstance(target, ast.Name) and root_name(target) in foreign:
                if not written.startswith("torch.backends."):
                    problems.append(f"{path}:{node.lineno} changes {written}")
    return problems


def sources() -> list[str]:
    """Return every Python file of the package, as paths below it."""
    return sorted(str(file.relative_to(ROOT)) for file in ROOT.rglob("*.py"))


def parsed(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=path)


def test_the_scan_sees_the_package() -> None:
    assert {"config.py", "recipe.py", "plan/layout.py", "vq/__init__.py"} <= set(sources())


def test_every_file_and_folder_has_a_floor() -> None:
    assert {module_unit(path) for path in sources()} - set(FLOORS) == set()


def test_every_folder_of_python_files_is_a_package() -> None:
    folders = {(ROOT / path).parent for path in sources()}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("path", sources())
def test_file_keeps_to_its_floor(path: str) -> None:
    assert import_violations(path, parsed(path)) == []


@pytest.mark.parametrize("path", [path for path in sources() if path != CPU_COMPAT])
def test_only_the_cpu_layer_changes_torch_or_megatron(path: str) -> None:
    assert patch_violations(path, parsed(path)) == []


@pytest.mark.parametrize("path", sources())
def test_file_is_short_documented_and_well_named(path: str) -> None:
    num_lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_LINES, f"{path} has {num_lines} lines; one idea per file"
    assert FOREIGN_NAMES.isdisjoint(part.removesuffix(".py") for part in Path(path).parts)
    assert ast.get_docstring(parsed(path)) or num_lines == 0, f"{path} does not state its purpose"


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
        ("config.py", "from megatron.core import parallel_state", "may not use megatron"),
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
        ("training/x.py", "import mlflow, vqmoe_megatron.data.x, vqmoe_megatron.moe"),
    ],
)
def test_legal_imports_pass(path: str, source: str) -> None:
    assert import_violations(path, ast.parse(source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.cuda.current_device = lambda: 'cpu'",
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
