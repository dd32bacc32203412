"""Overrides as a study file may write them: a list of ``key=value``, or a mapping of key to value.

    [vq.path=continuous, model.moe_router_topk=2]
    {vq.path: continuous, model.moe_router_topk: 2}

Whether a key is a setting, and its value legal, is judged where a run's recipe is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from vqmoe_megatron.config.recipe import holds_text, text_override


def override_texts(place: str, content: Any, problems: list[str]) -> tuple[str, ...] | None:
    """Return overrides as ``key=value`` texts, none for an empty section.

    Args:
        place: where they stand in the study file, for messages.
        content: as YAML has read it.
        problems: what is wrong is added; the result is then None.
    """
    num_before = len(problems)
    content = [] if content is None else content
    if isinstance(content, list):
        problems += _not_texts(place, content)
        texts = content
    elif isinstance(content, dict):
        problems += _not_settings(place, content)
        texts = [_text(str(key), value) for key, value in content.items()]
    else:
        problems.append(f"{place} {EXPECTED}, not {content!r}")
        texts = []
    if len(problems) > num_before:
        return None
    return tuple(texts)


EXPECTED = (
    "must be a list of overrides, for instance [vq.path=continuous], or a mapping, "
    "{vq.path: continuous}"
)


def key_of(override: str) -> str:
    """Return the dotted key of a ``key=value`` text."""
    return override.partition("=")[0].strip()


def _not_texts(place: str, content: list[Any]) -> Iterator[str]:
    if not all(isinstance(text, str) for text in content):
        yield f"{place} {EXPECTED}, not {content!r}"


def _not_settings(place: str, content: dict[Any, Any]) -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield (
                f"{place}.{key} must be one value, not {value!r}; write the whole key, for "
                "instance vq.path: continuous"
            )
        elif "=" in str(key):
            yield f"{place}: {key!r} holds a `=`; in a mapping write key: value"


def _text(key: str, value: Any) -> str:
    """A value of YAML as an override's text; one of a text setting is quoted where it must be."""
    if isinstance(value, str):
        return text_override(key, value) if holds_text(key) else f"{key}={value}"
    return f"{key}={json.dumps(value)}"  # numbers, true, null and lists, as YAML reads them too
