"""Parameters and tags as text within MLflow's limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

MAX_PARAM_CHARACTERS = 6000  # MLflow 3 limits, mlflow/utils/validation.py
MAX_TAG_CHARACTERS = 8000


def shortened(
    values: Mapping[str, object], max_characters: int, report: Callable[[str], None]
) -> dict[str, str]:
    """Return the values as text, cut to ``max_characters`` each; every cut is reported."""
    texts = {name: str(value) for name, value in values.items()}
    for name, text in texts.items():
        if len(text) > max_characters:
            report(f"{name} cut from {len(text)} to MLflow's limit of {max_characters} characters")
    return {name: text[:max_characters] for name, text in texts.items()}
