"""The supported versions of torch and megatron-core, and all that differs between them.

Nothing else in the package depends on a version. Where Megatron's releases differ in what we use, a
function below does it with each; it asks the library what it has, not which version it is. Torch
and Megatron are imported inside the functions: a missing one is a finding, not a traceback.

| | 0.16.1 | from |
|---|---|---|
| values of its MoE log | a global dict | 0.18: ``MoEMetricsTracker`` of ``moe_logging`` |
| plain values of a checkpoint | ``common.pt`` | 0.17: an object among the tensors |
| background saves | one way | 0.17: ``async_strategy``, by default a package that is not here |
| a balance loss of data-parallel ranks | ``reduce_group_has_dp`` | 0.18: ``needs_dp_avg=False`` |
| tokens of a balance loss | as told | 0.19: times the ranks of TP and CP |
| cutting a batch for context parallelism | of itself | 0.19: told the group and ``is_hybrid_cp`` |
| results of a checkpoint's writer | ``_get_write_results_queue`` | 0.17: without the underscore |
"""

from __future__ import annotations

import importlib.util
import inspect
import io
import re
import runpy
import warnings
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vqmoe_megatron import __version__

if TYPE_CHECKING:
    import torch

_RELEASE = re.compile(r"v?(\d+)\.(\d+)(?:\.(\d+))?")


class Supported(NamedTuple):
    """The releases of one package that are supported, and where it says which one it is."""

    package: str
    least: tuple[int, ...]  # the oldest supported release
    below: tuple[int, ...]  # the first that is not supported any more
    module: str
    version_file: str

    @property
    def requirement(self) -> str:
        """As pip takes it, for instance ``torch>=2.11,<2.14``."""
        return f"{self.package}>={_dotted(self.least)},<{_dotted(self.below)}"


TORCH = Supported("torch", (2, 11), (2, 14), "torch", "version.py")
MEGATRON_CORE = Supported("megatron-core", (0, 16, 1), (0, 20), "megatron.core", "package_info.py")


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def supported_version(supported: Supported) -> str | None:
    """The version that an import would bring, without importing it; None when there is none.

    Read from the package's own file: a checkout on the path comes before an installed one. One that
    cannot be read, whatever a broken installation raises, is told with its reason.
    """
    try:
        return _version_of(supported)
    except Exception as error:
        return f"broken ({type(error).__name__}: {error})"


def _version_of(supported: Supported) -> str | None:
    try:
        spec = importlib.util.find_spec(supported.module)
    except ModuleNotFoundError:  # of the package around it
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / supported.version_file
    if path.is_file():
        return str(runpy.run_path(str(path))["__version__"])
    try:
        return metadata.version(supported.package)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def is_supported(supported: Supported, version: str) -> bool:
    """Whether ``version`` is in the range, by its release numbers alone.

    ``2.11.0+cu130`` and ``2.11.0a0+ngc`` count as 2.11.0: NVIDIA's images carry builds that are
    named before the release they belong to.
    """
    found = _RELEASE.match(version)
    if found is None:
        return False
    release = tuple(int(number or 0) for number in found.groups())
    return supported.least <= release < supported.below


def versions_problem() -> str | None:
    """Say in one sentence what of torch and megatron-core is missing or outside the range."""
    wrong = []
    for supported in (TORCH, MEGATRON_CORE):
        version = supported_version(supported)
        if version is None or not is_supported(supported, version):
            wrong.append((supported, version or "not installed"))
    if not wrong:
        return None
    found = " and ".join(f"{each.package} is {version}" for each, version in wrong)
    wanted = " ".join(f"'{each.requirement}'" for each, _ in wrong)
    return (
        f"{found}; vqmoe_megatron {__version__} supports "
        f"{TORCH.requirement} and {MEGATRON_CORE.requirement}. Run pip install {wanted} "
        "(megatron-core from 0.17 on needs Python 3.12), or use a release of vqmoe_megatron that "
        "supports what is here"
    )


def check_versions() -> None:
    """Raise ``ValueError`` when torch or megatron-core is missing or outside the range."""
    problem = versions_problem()
    if problem is not None:
        raise ValueError(problem)


def warn_of_versions() -> None:
    """Warn, once, where :func:`check_versions` would raise.

    For the layer in somebody else's loop: whoever tries another Megatron there may go on.
    """
    problem = versions_problem()
    if problem is not None:
        warnings.warn(problem, stacklevel=2)


def _metrics_tracker() -> Any:
    """``moe_logging``'s tracker of 0.18 and newer, else None."""
    try:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    except ImportError:
        return None
    return get_moe_metrics_tracker()


def forget_moe_log() -> None:
    """Let Megatron's MoE log begin anew: it is global, sized for the first model, holds groups."""
    if _metrics_tracker() is not None:
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

        destroy_moe_metrics_tracker()
        return
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    get_moe_layer_wise_logging_tracker().clear()


def clear_moe_log() -> None:
    """Set the values of Megatron's MoE log to zero."""
    tracker = _metrics_tracker()
    if tracker is not None:
        tracker.clear()
        return
    from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker

    clear_aux_losses_tracker()


def add_to_moe_log(name: str, value: torch.Tensor, layer_number: int, num_layers: int) -> None:
    """Add a scalar of one layer (counted from 1) to Megatron's MoE log. No communication."""
    tracker = _metrics_tracker()
    if tracker is not None:
        tracker.record(name, value, layer_number, num_layers)
        return
    from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

    save_to_aux_losses_tracker(name, value, layer_number, num_layers)


def moe_log_values() -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yield (name, values [L], whether their group spans data-parallel ranks) of the MoE log.

    The values are those of this rank since they were cleared. No communication.
    """
    tracker = _metrics_tracker()
    if tracker is not None:
        for name, entry in tracker.metrics.items():
            yield name, entry.values, not entry.needs_dp_avg
        return
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    for name, values in get_moe_layer_wise_logging_tracker().items():
        yield name, values["values"], values["reduce_group_has_dp"]


def is_over_data_ranks(scope: Mapping[str, bool]) -> bool:
    """Whether a balance loss with these keywords of Megatron's is one over data-parallel ranks."""
    return scope.get("reduce_group_has_dp", False) or not scope.get("needs_dp_avg", True)


def balance_loss_factor(tp_cp_size: int) -> int:
    """By how much Megatron itself scales a balance loss beyond the tokens that it is told.

    Only the code of the function says so: its arguments are the same.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    code = TopKRouter.attach_and_log_load_balancing_loss.__code__
    return tp_cp_size if "tp_cp_group" in code.co_names else 1


def batch_on_this_cp_rank(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cut every ``[b, S]`` tensor to this context-parallel rank's part, by Megatron's own rule.

    ``batch`` itself stays as it is. No communication.
    """
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    own: dict[str, Any] = {"cp_group": parallel_state.get_context_parallel_group()}
    if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters:
        own["is_hybrid_cp"] = False
    return get_batch_on_this_cp_rank(dict(batch), **own)


def async_save(state: dict[str, Any], folder: Path) -> Any:
    """Return Megatron's own ``AsyncRequest`` that writes ``state`` into ``folder``.

    Communicates over the world: all ranks plan together.
    """
    from megatron.core import dist_checkpointing

    own: dict[str, Any] = {}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        own["async_strategy"] = "mcore"
    return dist_checkpointing.save(state, str(folder), async_sharded_save=True, **own)


def common_file(state: dict[str, Any]) -> bytes | None:
    """The content of ``common.pt``, the plain values of ``state``; None where Megatron writes it.

    Newer Megatrons read the file where there is one and write none. With it a checkpoint is the
    same at every version, and is read without ranks. No communication.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

    if "common_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        return None
    import torch

    _, common = save_preprocess(state, validate_access_integrity=False)
    content = io.BytesIO()
    torch.save(common, content)
    return content.getvalue()


def results_queue_function(filesystem_async: Any) -> str:
    """The name of the function by which Megatron's checkpoint writer gets its results' queue."""
    names = ("get_write_results_queue", "_get_write_results_queue")
    return next(name for name in names if hasattr(filesystem_async, name))
