"""Transformer Engine's and Apex's kernels: which can really be imported here, and which a run uses.

A package's name proves nothing: PyPI's ``apex`` is another package, an empty folder imports, and a
build may lack a compiled module. So every part is judged by the very names it is made of, imported
in an order that runs no code of a package whose compiled module is missing.

Its switch in the recipe is null (``auto``): used on CUDA where it can be imported, else left out
with a line that says why. On the CPU no part is ever used, and nothing is said.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from vqmoe_megatron.config import RunConfig

MOST_SHOWN = 200  # characters of an import error
NEEDS_CUDA = "its kernels need a CUDA device"
SET_IMPL = "set model.transformer_impl=transformer_engine or auto"
Obstacle = Callable[[], str | None]


@dataclass(frozen=True)
class Kernel:
    """One optional part: ``imports`` are (module, name in it) in the order they are tried."""

    title: str
    imports: tuple[tuple[str, str], ...]

    def obstacle(self) -> str | None:
        """Say what keeps it from being imported here, None when nothing does."""
        for module, name in self.imports:
            if (problem := import_problem(module, name)) is not None:
                return problem.reason
        return None


# Transformer Engine loads its compiled module itself, from where its wheel keeps it; Apex's lie
# beside it and are tried first.
TE_COMPILED = ("transformer_engine_torch", "")
TE_LAYERS = Kernel(
    "Transformer Engine's linear layers, attention and norms",
    (
        ("transformer_engine.pytorch", "LayerNormLinear"),
        ("transformer_engine.pytorch", "Linear"),
        ("transformer_engine.pytorch", "DotProductAttention"),
        TE_COMPILED,
    ),
)
APEX_NORM = Kernel(
    "Apex's layer norm",
    (
        ("fused_layer_norm_cuda", ""),
        ("apex.normalization.fused_layer_norm", "FusedLayerNormAffineFunction"),
    ),
)
TE_ADAM = Kernel(
    "Transformer Engine's Adam",
    (
        ("transformer_engine.pytorch.optimizers", "FusedAdam"),
        ("transformer_engine.pytorch.optimizers", "FusedSGD"),  # Megatron wants both or neither
        TE_COMPILED,
    ),
)
APEX_ADAM = Kernel(
    "Apex's Adam",
    (
        ("amp_C", "multi_tensor_adam"),
        ("apex.optimizers", "FusedSGD"),
        ("apex.optimizers", "FusedAdam"),
    ),
)
WGRAD = Kernel(
    "Apex's accumulating weight gradient",
    (("fused_weight_gradient_mlp_cuda", "wgrad_gemm_accum_fp32"),),
)
FP8 = Kernel(
    "Transformer Engine's fp8 autocast and grouped linear layers",
    (
        ("transformer_engine.pytorch", "fp8_autocast"),
        ("transformer_engine.pytorch", "GroupedLinear"),
        TE_COMPILED,
    ),
)


# What the doctor shows: part, its kernels in the order of preference, what runs without them.
PARTS: tuple[tuple[str, tuple[Kernel, ...], str], ...] = (
    ("linear layers", (TE_LAYERS,), "Megatron's own (model.transformer_impl)"),
    ("norms", (TE_LAYERS, APEX_NORM), "torch's (model.fused_layer_norm)"),
    ("fused adam", (TE_ADAM, APEX_ADAM), "torch's AdamW (optimizer.fused_adam)"),
    (
        "gradient accumulation fusion",
        (WGRAD,),
        "a pass of its own adds up (model.gradient_accumulation_fusion)",
    ),
    ("fp8 experts", (FP8,), "model.fp8 is refused"),
)


@dataclass(frozen=True)
class FusedParts:
    """What a run uses of them."""

    transformer_impl: str = "local"  # Megatron's name; or "transformer_engine", norms included
    apex_norm: bool = False  # of local layers
    gradient_accumulation_fusion: bool = False
    fused_adam: bool = False
    fallbacks: tuple[str, ...] = ()  # one line for each part that is left out on CUDA


PLAIN = FusedParts()  # Megatron's and torch's own code everywhere


@dataclass(frozen=True)
class ImportProblem:
    """Why a name cannot be imported."""

    reason: str
    is_import_error: bool = True  # what megatron-core catches; it catches nothing else


def import_problem(module: str, name: str = "") -> ImportProblem | None:
    """Import ``module``, and ``name`` from it; None when that works, else why not."""
    top = module.partition(".")[0]
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == top:
            return ImportProblem(f"{top} is not installed")
        if folder := folder_without_code(top):
            return ImportProblem(f"{top} at {folder} is a folder without code")
        return ImportProblem(f"{module} does not import: {error}")
    except Exception as error:  # a broken CUDA extension may raise anything
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:MOST_SHOWN]}"
        return ImportProblem(f"{module} does not import: {text}", isinstance(error, ImportError))
    if name and not hasattr(found, name):
        return ImportProblem(f"{module} at {place_of(module)} has no {name}")
    return None


def place_of(package: str) -> str:
    """Return the file of an importable package or module, or its folder where it is only that."""
    spec = importlib.util.find_spec(package)
    return (spec.origin if spec else None) or folder_without_code(package) or "an unknown place"


def folder_without_code(package: str) -> str | None:
    """Return the folder of a package that is nothing but a folder; None for any other."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is not None:
        return None
    return ", ".join(spec.submodule_search_locations or ()) or None


def megatrons_adam() -> Kernel | None:
    """Return the fused Adam that megatron-core takes by itself at its import; None: torch's.

    Raises:
        ValueError: where megatron-core would crash by its choice: it catches an ImportError only,
            and Apex's Adam imports without its kernels and raises when it is built.
    """
    problem = import_problem(*TE_ADAM.imports[0]) or import_problem(*TE_ADAM.imports[1])
    if problem is None:
        return TE_ADAM
    if not problem.is_import_error:
        raise ValueError(
            f"megatron-core cannot be imported beside this Transformer Engine: {problem.reason}; "
            "repair it or remove it from the path"
        )
    if any(import_problem(*wanted) for wanted in APEX_ADAM.imports[1:]):
        return None
    if (obstacle := APEX_ADAM.obstacle()) is not None:
        raise ValueError(
            f"megatron-core takes Apex's FusedAdam, since it imports, but it cannot be built: "
            f"{obstacle}; build Apex with its CUDA extensions, or remove it from the path"
        )
    return APEX_ADAM


def choose_parts(config: RunConfig, device: str) -> FusedParts:
    """Settle every switch of ``config`` for ``device`` (``cpu`` or ``cuda``). No communication.

    Raises:
        ValueError: for a part that the recipe asks for and that cannot be used here, and where
            megatron-core would crash by its own choice; with the reason.
    """
    model = config.model
    fallbacks: list[str] = []

    def is_used(key: str, wanted: bool | None, obstacle: Obstacle, instead: str) -> bool:
        if wanted is False or (wanted is None and device != "cuda"):
            return False
        reason = obstacle() if device == "cuda" else NEEDS_CUDA
        if wanted and reason is not None:
            raise ValueError(
                f"{key} cannot be had here (device={device}): {reason}; leave it out, or install "
                "what is missing"
            )
        if reason is not None:
            fallbacks.append(f"{instead}: {reason}")
        return reason is None

    has_engine = is_used(
        "model.transformer_impl=transformer_engine",
        {"auto": None, "local": False, "transformer_engine": True}[model.transformer_impl],
        TE_LAYERS.obstacle,
        "layers are Megatron's own",
    )
    if has_engine and model.fused_layer_norm is False:
        raise ValueError(
            "model.fused_layer_norm=false with Transformer Engine's layers, whose norms are parts "
            "of its linear layers; set model.transformer_impl=local as well"
        )
    has_apex_norm = not has_engine and is_used(
        "model.fused_layer_norm=true",
        model.fused_layer_norm,
        partial(apex_norm_obstacle, model.normalization),
        "norms are torch's",
    )
    accumulates = is_used(
        "model.gradient_accumulation_fusion=true",
        model.gradient_accumulation_fusion,
        WGRAD.obstacle,
        "weight gradients are added up by a pass of their own",
    )
    adam = megatrons_adam()
    has_fused_adam = is_used(
        "optimizer.fused_adam=true",
        config.optimizer.fused_adam,
        lambda: None if adam else f"{TE_ADAM.obstacle()}; {APEX_ADAM.obstacle()}",
        "Adam is torch's",
    )
    if model.fp8 is not None:
        obstacle = FP8.obstacle if has_engine else TE_LAYERS.obstacle
        is_used(f"model.fp8={model.fp8}", True, obstacle, "")
        if not has_engine:
            raise ValueError(f"model.fp8={model.fp8} needs Transformer Engine's layers; {SET_IMPL}")
    return FusedParts(
        "transformer_engine" if has_engine else "local",
        has_apex_norm,
        accumulates,
        has_fused_adam,
        tuple(fallbacks),
    )


def part_findings(device: str) -> list[tuple[str, str, str]]:
    """Return (part, path taken, reason) of every part under the default recipe on ``device``."""
    found = []
    for part, kernels, otherwise in PARTS:
        obstacles = [kernel.obstacle() for kernel in kernels]
        usable = [k for k, obstacle in zip(kernels, obstacles, strict=True) if obstacle is None]
        reasons = "; ".join(dict.fromkeys(obstacle for obstacle in obstacles if obstacle))
        if not usable:
            found.append((part, "not used", f"{reasons}; {otherwise}"))
            continue
        where = f"{usable[0].title}, {place_of(usable[0].imports[-1][0])}"
        if device != "cuda":
            found.append((part, "not used", f"{where}, but {NEEDS_CUDA}; {otherwise}"))
        else:
            found.append((part, "used", where))
    try:
        megatrons_adam()
    except ValueError as error:
        found.append(("fused adam", "REFUSED", str(error)))
    return found


def apex_norm_obstacle(normalization: str) -> str | None:
    """Say why Apex's norm is not used for norms of this kind, None when it is."""
    if normalization != "LayerNorm":
        return f"Megatron's FusedLayerNorm is no {normalization}"
    return APEX_NORM.obstacle()
