"""What can be chosen by name: quantizers, routers, tasks, engines, trackers and the like.

A line here makes a part known: ``name -> "module:attribute"``. Nothing is imported before it is
asked for, so that messages, ``--help`` and plans can name every choice without torch. A package of
the user's adds its own through entry points of the group ``vqmoe_megatron``, named ``kind.name``:

    [options.entry_points]
    vqmoe_megatron =
        quantizer.mine = my_package.mine:Mine

The interface that a kind has to implement is the class named beside it in :data:`KINDS`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

GROUP = "vqmoe_megatron"
Target = str  # "module:attribute"


@dataclass(frozen=True)
class Part:
    """One of ours: where it is, and what must be known of it before it is imported."""

    target: Target
    takes: frozenset[str] = frozenset()  # settings that only some parts of the kind have


@dataclass(frozen=True)
class Kind:
    """One kind of part: the interface it implements, the key that names it, those that we ship."""

    interface: Target
    key: str  # recipe key whose value is a name of this kind; without one, the kind
    built_in: dict[str, Part]
    is_instance: bool = False  # a part is an instance of the interface, and no subclass


OF_PROJECTED = frozenset({"code_dim", "train_projection"})
KINDS: dict[str, Kind] = {
    "quantizer": Kind(
        "vqmoe_megatron.vq.codebook:Codebook",
        "vq.quantizer",
        {
            "euclidean": Part("vqmoe_megatron.vq.quantizers.euclidean:Euclidean"),
            "cosine": Part(
                "vqmoe_megatron.vq.quantizers.cosine:Cosine", frozenset({"learn_code_scale"})
            ),
            "product": Part(
                "vqmoe_megatron.vq.quantizers.product:Product", frozenset({"num_code_slices"})
            ),
            "residual": Part(
                "vqmoe_megatron.vq.quantizers.residual:Residual", frozenset({"num_code_slices"})
            ),
            "low_dim": Part("vqmoe_megatron.vq.quantizers.low_dim:LowDim", OF_PROJECTED),
            "fsq": Part("vqmoe_megatron.vq.quantizers.fsq:Fsq", OF_PROJECTED | {"fsq_levels"}),
            "lfq": Part("vqmoe_megatron.vq.quantizers.lfq:Lfq", OF_PROJECTED),
        },
    ),
    "router": Kind(
        "megatron.core.transformer.moe.router:Router",
        "model.moe_router",
        {
            "topk": Part("vqmoe_megatron.moe.routers.topk:BalancedRouter"),
            "x_moe": Part(
                "vqmoe_megatron.moe.routers.x_moe:XMoERouter",
                frozenset({"variant", "low_dim", "initial_temperature"}),
            ),
            "smoe_dropout": Part(
                "vqmoe_megatron.moe.routers.smoe_dropout:SMoEDropoutRouter",
                frozenset({"min_topk", "schedule_steps", "eval_topk"}),
            ),
            "hash": Part("vqmoe_megatron.moe.routers.hash:HashRouter"),
            "switch": Part(
                "vqmoe_megatron.moe.routers.switch:SwitchRouter", frozenset({"capacity_factor"})
            ),
            "loss_free": Part(
                "vqmoe_megatron.moe.routers.loss_free:LossFreeRouter",
                frozenset({"bias_update_rate"}),
            ),
            "stable_moe": Part(
                "vqmoe_megatron.moe.routers.stable_moe:StableMoERouter",
                frozenset({"variant", "stage_1_steps", "light_dim", "distill_coeff"}),
            ),
        },
    ),
    "task": Kind(
        "vqmoe_megatron.tasks.task:Task",
        "train.task",
        {
            "pretrain": Part("vqmoe_megatron.tasks.pretrain:Pretrain"),
            "finetune": Part("vqmoe_megatron.tasks.finetune:Finetune"),
            "images": Part("vqmoe_megatron.tasks.images:Images"),
        },
    ),
    "engine": Kind(
        "vqmoe_megatron.engines.engine:Engine",
        "train.engine",
        {
            "megatron": Part("vqmoe_megatron.engines.megatron.engine:MegatronEngine"),
            "deepspeed": Part("vqmoe_megatron.engines.deepspeed.engine:DeepSpeedEngine"),
        },
    ),
    "substrate": Kind(
        "vqmoe_megatron.launch.substrate:Substrate",
        "launch substrate",
        {
            "torchrun": Part("vqmoe_megatron.launch.torchrun:Torchrun"),
            "slurm": Part("vqmoe_megatron.launch.slurm:Slurm"),
        },
    ),
    "schedule": Kind(
        "megatron.core.optimizer_param_scheduler:OptimizerParamScheduler",
        "optimizer.lr_decay_style",
        {
            name: Part("megatron.core.optimizer_param_scheduler:OptimizerParamScheduler")
            for name in ("constant", "linear", "cosine", "inverse-square-root")
        },
    ),
    "tracker": Kind(
        "vqmoe_megatron.track.tracker:Tracker",
        "tracking.also",
        {
            "mlflow": Part("vqmoe_megatron.track.mlflow.tracker:MlflowTracker"),
            "tensorboard": Part("vqmoe_megatron.track.tensorboard:TensorBoardTracker"),
            "wandb": Part("vqmoe_megatron.track.wandb:WandbTracker"),
        },
    ),
    # Ours are rows of vqmoe_megatron.metrics.table; a row is an instance, and brings its own name.
    "metric": Kind("vqmoe_megatron.metrics.metric:Metric", "metric", {}, is_instance=True),
}


@functools.cache
def _installed() -> dict[str, dict[str, Target]]:
    """Targets of installed packages, by kind and name.

    Raises:
        ValueError: for an entry point of our group that is named wrongly or names one of ours.
    """
    found: dict[str, dict[str, Target]] = {kind: {} for kind in KINDS}
    for point in importlib.metadata.entry_points(group=GROUP):
        kind, _, name = point.name.partition(".")
        where = f"entry point {point.name} = {point.value} of group {GROUP}"
        if kind not in KINDS or not name:
            raise ValueError(f"{where}: write KIND.NAME with a kind of {', '.join(KINDS)}")
        if name in KINDS[kind].built_in or name in found[kind]:
            raise ValueError(f"{where}: there is a {kind} {name} already; choose another name")
        found[kind][name] = point.value
    return found


def names(kind: str) -> tuple[str, ...]:
    """All names of a kind: ours, then those of installed packages. Imports none of them."""
    return (*KINDS[kind].built_in, *_installed()[kind])


def check_name(kind: str, name: object) -> None:
    """Raise ``ValueError`` with the legal names when ``name`` is not one of them."""
    if name not in KINDS[kind].built_in and name not in (legal := names(kind)):
        raise ValueError(
            f"{KINDS[kind].key}={name!r} is not legal; choose one of {', '.join(legal)}"
        )


def is_ours(kind: str, name: str) -> bool:
    """Whether the name stands for a part of this package."""
    return name in KINDS[kind].built_in


def load(kind: str, name: str) -> Any:
    """Import what a name stands for.

    Raises:
        ValueError: when the name is not known, its part cannot be imported, or an installed
            package's does not implement the kind's interface; says from where.
    """
    check_name(kind, name)
    ours = KINDS[kind].built_in.get(name)
    if ours is not None:
        return _attribute_of(ours.target)
    target = _installed()[kind][name]
    where = f"entry point {kind}.{name} = {target} of group {GROUP}"
    try:
        part = _attribute_of(target)
    except Exception as error:  # whatever the package does when it is imported
        raise ValueError(
            f"{where} cannot be loaded: {type(error).__name__}: {error}; mend or uninstall the "
            "package"
        ) from error
    if (fault := _fault_of(part, KINDS[kind])) is not None:
        raise ValueError(f"{where} {fault}")
    return part


def _attribute_of(target: Target) -> Any:
    module, _, attribute = target.partition(":")
    return attrgetter(attribute)(importlib.import_module(module))


def _fault_of(part: Any, kind: Kind) -> str | None:
    """How the part fails to implement its kind's interface, or None."""
    interface = _attribute_of(kind.interface)
    wanted = kind.interface.replace(":", ".")
    if kind.is_instance:
        if isinstance(part, interface):
            return None
        return f"is a {type(part).__name__}; it must be an instance of {wanted}"
    if not isinstance(part, type):
        return f"is a {type(part).__name__}; it must be a subclass of {wanted}"
    if not issubclass(part, interface):
        return f"is the class {part.__qualname__}; it must be a subclass of {wanted}"
    if inspect.isabstract(part):
        lacking = ", ".join(sorted(vars(part)["__abstractmethods__"]))
        return f"does not define {lacking}, which {wanted} asks for"
    return None


def takes(kind: str, name: str) -> frozenset[str]:
    """Settings that the part has and others of its kind may lack; imports no part of ours.

    A part of an installed package says so in its attribute ``takes``.
    """
    check_name(kind, name)
    ours = KINDS[kind].built_in.get(name)
    return load(kind, name).takes if ours is None else ours.takes
