"""What a part of an analysis is, and what it is given.

A part is asked about one model at a time (``measure``), since one model at a time is in memory.
What it finds is plain data: it goes into ``analysis.json``, and ``section`` makes a section of the
page of it, all models side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vqmoe_megatron.analysis.loaded_model import LoadedModel
from vqmoe_megatron.analysis.observation import Observation, observe
from vqmoe_megatron.analysis.settings import Settings
from vqmoe_megatron.analysis.text import Text
from vqmoe_megatron.study.report.page import Section

Findings = dict[str, Any]  # JSON; {"reason": text} where the part does not apply
REASON = "reason"


@dataclass(frozen=True)
class Subject:
    """One model, and the text that it is asked about."""

    model: LoadedModel
    settings: Settings
    text: Text
    domain: Text | None = None  # held-out text of the other corpus
    domain_train: Text | None = None
    train: Text | None = None  # training text of the model's own corpus
    earlier: Mapping[int, Observation] = field(default_factory=dict)  # of its run, by iteration

    @cached_property
    def seen(self) -> Observation:
        """What the model chooses and loses on the undisturbed text."""
        return observe(self.model, self.text.batches())


@dataclass(frozen=True)
class Part:
    """One measure."""

    name: str  # in --parts
    measure: Callable[[Subject], Findings]
    section: Callable[[Mapping[str, Findings], Settings], Section]  # by the model's name


def applying(findings: Mapping[str, Findings]) -> dict[str, Findings]:
    """Those of the models that the part applies to."""
    return {name: found for name, found in findings.items() if REASON not in found}


def reasons(findings: Mapping[str, Findings]) -> list[str]:
    """A sentence for every other model."""
    return [f"{name}: {found[REASON]}" for name, found in findings.items() if REASON in found]
