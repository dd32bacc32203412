"""Packages that one part needs and training does not: whether they are here, and what to do if not.

They are the extras of setup.cfg. No file imports one at its top but those that only its part
imports; that part asks here first, so that a missing package is a sentence and not a traceback.
"""

from __future__ import annotations

import importlib.util

# By the module that is imported: the extra of setup.cfg that brings it, and what goes on without.
OPTIONAL_PACKAGES = {
    "mlflow": ("mlflow", "runs are not tracked; metrics.jsonl is still written"),
    "matplotlib": ("plots", "no plots are drawn; metrics.jsonl and routing.npz are still written"),
    "sentencepiece": ("sentencepiece", "byte, char and word vocabularies work"),
}


def missing(package: str) -> str | None:
    """Say that ``package`` is not installed and how to install it; None when it can be found.

    Args:
        package: a key of :data:`OPTIONAL_PACKAGES`. It is not imported.
    """
    if importlib.util.find_spec(package) is not None:
        return None
    extra, _ = OPTIONAL_PACKAGES[package]
    return f"{package} is not installed (pip install 'vqmoe_megatron[{extra}]')"


def require(package: str, what: str) -> None:
    """Raise ``ValueError`` when ``package`` is missing; ``what`` names the part that needs it."""
    problem = missing(package)
    if problem is not None:
        raise ValueError(f"{what} needs {package}: {problem}")
