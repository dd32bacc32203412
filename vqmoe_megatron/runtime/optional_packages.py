"""Packages that one part needs and training does not: whether they are here, and what to do if not.

They are extras of setup.cfg. Only the part that needs one imports it, and asks here before, so that
a missing package is a sentence and not a traceback.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from typing import NamedTuple


class OptionalPackage(NamedTuple):
    """What brings a package, and what it is for."""

    requirement: str  # as pip takes it
    with_it: str
    without_it: str

    @property
    def distribution(self) -> str:
        """The name that pip and importlib.metadata know, for instance ``pillow`` of ``PIL``."""
        return re.split(r"[<>=!~ ]", self.requirement, maxsplit=1)[0]


# By the module that is imported, which is the name of the package, too, unless it is said.
OPTIONAL_PACKAGES = {
    "mlflow": OptionalPackage(
        "mlflow>=3.5,<4", "runs are tracked", "runs are not tracked, metrics.jsonl is still written"
    ),
    "tensorboard": OptionalPackage(
        "tensorboard>=2.19,<3", "tracking.also=[tensorboard] works", "MLflow and the logs work"
    ),
    "wandb": OptionalPackage(
        "wandb>=0.20,<1", "tracking.also=[wandb] works", "MLflow and the logs work"
    ),
    "transformers": OptionalPackage(
        "transformers>=5,<6", "vqmoe generate works", "vqmoe export --hf works"
    ),
    "matplotlib": OptionalPackage(
        "matplotlib>=3.9,<4", "plots are drawn", "no plots; what they show is still written"
    ),
    "scipy": OptionalPackage(
        "scipy>=1.11,<2", "vqmoe analyze works", "everything but vqmoe analyze works"
    ),
    "deepspeed": OptionalPackage(
        "deepspeed>=0.19.8,<0.20", "train.engine=deepspeed works", "train.engine=megatron works"
    ),
    "PIL": OptionalPackage(
        "pillow>=10,<14", "vqmoe prepare images works", "digits and cifar10 can be prepared"
    ),
    "sklearn": OptionalPackage(
        "scikit-learn>=1.4,<2", "vqmoe prepare digits works", "other images can be prepared"
    ),
    "sentencepiece": OptionalPackage(
        "sentencepiece>=0.2,<0.3", "its vocabularies work", "byte, char and word work"
    ),
}


def missing(package: str) -> str | None:
    """Say that ``package`` is not installed and how to install it; None when it can be found.

    Args:
        package: a key of :data:`OPTIONAL_PACKAGES`. It is not imported.
    """
    if importlib.util.find_spec(package) is not None:
        return None
    requirement = OPTIONAL_PACKAGES[package].requirement
    return f"{package} is not installed (pip install '{requirement}')"


def require(package: str, what: str) -> None:
    """Import ``package``; raise ``ValueError`` when it is missing or broken.

    ``what`` names the part that needs it.
    """
    problem = missing(package)
    if problem is None:
        try:
            importlib.import_module(package)
        except Exception as error:  # whatever a broken installation raises
            problem = f"{package} cannot be imported ({type(error).__name__}: {error})"
    if problem is not None:
        raise ValueError(f"{what} is not possible: {problem}")
