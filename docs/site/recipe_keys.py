"""The page of recipe keys: every key with its type, default, unit, legal values and meaning.

Nothing of it is written twice. Keys and defaults are the fields of the section dataclasses, ranges
the rows of ``config/ranges.py``, names to choose from those that the section's own refusal lists,
meanings the comments beside the fields, or ``meanings.yaml`` where a stranger needs more.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.declared_types import alternatives, declared_types
from vqmoe_megatron.config.ranges import LEGAL_RANGES, Range

NOT_A_NAME = "no such name"
CHOICES = re.compile(r"choose one of ([^;]+)")

SECTION_WORDS = {
    "model": "The transformer. Names are those of Megatron's `TransformerConfig`.",
    "vq": "The paper's layer: its codebook and the paths that use it.",
    "router": "Of the routers beside `model.moe_router=topk`; each takes those that name it.",
    "code_memory": "Learned rows that a token reads by its code and by those before it.",
    "vision": "Images in the place of text (`train.task=images`), cut into patches.",
    "finetune": "A classification head on labelled texts; `vqmoe finetune` sets these keys.",
    "parallel": "The layout: over how many ranks the model is cut, and how.",
    "data": "The corpus to read, and how to score on it.",
    "optimizer": "Megatron's Adam and its learning-rate schedule.",
    "train": "The loop: how long, how large a batch, when to look, when to stop.",
    "checkpoint": "When to save, what to load, how many to keep.",
    "tracking": "Where metrics go besides `metrics.jsonl`.",
}

# By the end of a name; the first that fits. What has none is a plain number.
UNITS = {
    "eval_iters": "global batches",
    "virtual_pipeline_model_parallel_size": "pieces of layers",
    "_interval": "iterations",
    "_iters": "iterations",
    "_after_steps": "optimizer steps",
    "_tokens": "tokens",
    "_in_mins": "minutes",
    "batch_size": "samples",
    "parallel_size": "ranks",
    "seq_length": "tokens",
    "image_size": "pixels",
    "patch_size": "pixels",
    "crop_padding": "pixels",
    "num_layers": "layers",
    "moe_layer_freq": "layers",
    "num_moe_experts": "experts",
    "num_fill_experts": "experts",
    "moe_router_topk": "experts",
    "num_classes": "classes",
    "_codes": "codes",
    "num_rows": "rows",
    "num_workers": "processes a rank",
    "vocab_size": "tokens",
    "keep_last": "checkpoints",
}

MEANINGS = yaml.safe_load(Path(__file__).with_name("meanings.yaml").read_text("utf-8"))

PREFACE = """\
# Recipe keys

Made from the section dataclasses when this site is built: every key of a recipe, as this release
has it. Any key can be given on the command line as `section.key=value`; `null` is YAML's none. A
key outside its legal values is refused with exit code 2 before anything is written, and an unknown
key is answered with the nearest legal ones. Rules between keys are checked at the same moment;
their messages are in [Troubleshooting](../troubleshooting.md).

The default is what a key has when a recipe leaves it out. `recipes/quickstart.yaml` sets others.
"""


def sections() -> dict[str, type]:
    """Section name -> its dataclass, in the order of a recipe."""
    return dict(declared_types(RunConfig))


def comments(section_type: type) -> dict[str, str]:
    """The comment behind each field, on its own line or on its last one."""
    lines = textwrap.dedent(inspect.getsource(section_type)).splitlines()
    (body,) = ast.parse("\n".join(lines)).body
    found = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign):
            own = lines[node.lineno - 1 : node.end_lineno]
            own = own[:-1] if own[1:] and own[-1].strip() == ")" else own
            comment = re.search(r"\s#\s(.*)$", " ".join(own))
            if comment:
                found[node.target.id] = comment[1]
    return found


def choices(section_type: type, name: str, hint: Any) -> tuple[str, ...]:
    """The names that a text key may have, as its section's refusal lists them; () for any text."""
    is_list = any(get_origin(kind) is list for kind in alternatives(hint))
    if str not in alternatives(hint) and not is_list:
        return ()
    try:
        section_type(**{name: [NOT_A_NAME] if is_list else NOT_A_NAME})
    except ValueError as error:
        found = CHOICES.search(str(error))
        names = found[1].split(", ") if found else []
        return tuple(name for name in names if not (is_list and name == "mlflow"))
    return ()


def type_in_words(hint: Any) -> str:
    """A declared type for a reader: ``int or null``."""
    names = []
    for kind in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        if get_origin(kind) is list:
            names.append(f"list of {get_args(kind)[0].__name__}")
        else:
            names.append({type(None): "null", bool: "true or false"}.get(kind, kind.__name__))
    return " or ".join(names)


def default_of(field: dataclasses.Field) -> str:
    """A field's default as YAML."""
    is_made = field.default is dataclasses.MISSING
    value = field.default_factory() if is_made else field.default
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def legal_values(section: str, section_type: type, field: dataclasses.Field) -> str:
    """What a key may hold besides its type, in Markdown."""
    hint = declared_types(section_type)[field.name]
    names = choices(section_type, field.name, hint)
    if names:
        return ", ".join(f"`{name}`" for name in names)
    legal = LEGAL_RANGES.get(f"{section}.{field.name}")
    return borders(legal) if legal is not None else ""


def borders(legal: Range) -> str:
    """A range for a reader: ``1 to 2,000``."""

    def shown(border: float) -> str:
        return f"{int(border):,}" if border == int(border) else str(border)

    low = "above " * legal.without_low + shown(legal.low)
    return f"{low} to {'below ' * legal.without_high}{shown(legal.high)}"


def unit_of(name: str) -> str:
    """The unit of a number, by the end of its name."""
    return next((unit for end, unit in UNITS.items() if name.endswith(end)), "")


def meaning_of(section: str, section_type: type, name: str) -> str:
    """One line that says what a key does: ours here, or the comment beside the field."""
    comment = comments(section_type).get(name, "").replace("None", "null")
    is_of_a_value = ":" in comment.partition(" ")[0]
    said = comment if is_of_a_value else comment[:1].upper() + comment[1:]
    return MEANINGS.get(section, {}).get(name, said)


def section_page(section: str, section_type: type) -> str:
    """One section: a heading and its table."""
    rows = []
    hints = declared_types(section_type)
    for field in dataclasses.fields(section_type):
        unit = unit_of(field.name)
        words = [type_in_words(hints[field.name])] + ([unit] if unit else [])
        key = f"`{section}.{field.name}`<br>{meaning_of(section, section_type, field.name)}"
        legal = legal_values(section, section_type, field)
        cells = (key, f"`{default_of(field)}`", ", ".join(words), legal)
        rows.append("| " + " | ".join(cell.replace("|", "or") for cell in cells) + " |")
    head = "| key | default | type, unit | legal values |\n|---|---|---|---|\n"
    return f"\n## {section}\n\n{SECTION_WORDS.get(section, '')}\n\n{head}" + "\n".join(rows) + "\n"


def page() -> str:
    """The whole page, in Markdown."""
    return PREFACE + "".join(section_page(name, kind) for name, kind in sections().items())
