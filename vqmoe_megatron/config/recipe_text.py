"""The YAML text of a recipe or a study: read once, and refused unbuilt where that would not end.

A few bytes of YAML can stand for more than a machine holds: aliases of aliases, endless nesting,
numbers of thousands of digits. Recipes and studies need none of these, so their limits are far off.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # OmegaConf's own parser: for its error class and its line numbers
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

MOST_BYTES = 2**17  # of a file; recipes have a few thousand
MOST_VALUES = 10_000  # with every alias written out
MOST_DEPTH = 10  # section, key, list, and room for what is only going to be refused
MOST_DIGITS = 1000
INT_TAG, STR_TAG, NULL_TAG = (f"tag:yaml.org,2002:{name}" for name in ("int", "str", "null"))
RESOLVER = yaml.SafeLoader("")  # what an untagged value is

Lines = dict[tuple[str, ...], int]


@dataclass(frozen=True)
class FileKind:
    """What a file is meant to be, in messages."""

    name: str
    plural: str
    folder: Path  # where others of its kind are
    beginning: str  # what to write into an empty one


RECIPE = FileKind(
    "recipe",
    "recipes",
    Path("recipes"),
    "{} for all defaults, or start from recipes/quickstart.yaml",
)
STUDY = FileKind(
    "study",
    "studies",
    Path("recipes/studies"),
    "or start from recipes/studies/stdlib_experts.yaml",
)


def read_yaml_text(path: Path, kind: FileKind = RECIPE) -> str:
    """Return the text of a file or a pipe, which can be read only once.

    Raises:
        ValueError: when it is missing, a folder, too long, not text, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ValueError(_missing_file(path, kind)) from None
    except OSError as error:
        raise ValueError(f"{kind.name} {path} cannot be read: {error.strerror}") from None
    if len(raw) > MOST_BYTES:
        raise ValueError(
            f"{path} cannot be read as a {kind.name}: it is longer than {MOST_BYTES} bytes"
        )
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} cannot be read as a {kind.name}: it is not text in UTF-8 (byte {error.start})"
        ) from None


def parse_yaml_text(
    text: str, path: Path, sections: str, kind: FileKind = RECIPE
) -> tuple[dict[Any, Any], Lines]:
    """Return the sections of a file's text as plain values, and the line of each key.

    Args:
        text: what ``path`` holds.
        path: for messages.
        sections: the legal ones, for messages.
        kind: for messages.

    Raises:
        ValueError: when it is not YAML, empty, or no mapping.
    """
    try:
        root = compose_bounded(text)
        if root is None or root.tag == NULL_TAG:
            raise ValueError(
                f"{path} is empty: write sections ({sections}) with `key: value` lines, "
                f"{kind.beginning}"
            )
        if not isinstance(root, yaml.MappingNode):
            found = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
            raise ValueError(f"{path} must hold sections ({sections}), not {found}")
        loaded = OmegaConf.load(io.StringIO(text))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {where_and_why(error)}") from error
    except OmegaConfBaseException as error:
        why = " ".join(str(error).split())  # its later lines name the key
        raise ValueError(f"{path} cannot be read as a {kind.name}: {why}") from error
    content: Any = OmegaConf.to_container(loaded)
    return content, _line_numbers(root)


def compose_bounded(text: str) -> yaml.Node | None:
    """Return the YAML nodes of ``text``, None for an empty one.

    Raises:
        yaml.YAMLError: when it is malformed, or stands for more than a file may hold.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise yaml.YAMLError(f"nested deeper than {MOST_DEPTH} levels") from None
    if root is not None and _num_values(root, {}, MOST_DEPTH) > MOST_VALUES:
        raise yaml.YAMLError(f"more than {MOST_VALUES:,} values, its aliases written out")
    return root


def where_and_why(error: yaml.YAMLError) -> str:
    """Say in one line where YAML is malformed, if it is known, and why."""
    mark = getattr(error, "problem_mark", None)
    why = getattr(error, "problem", None) or str(error).splitlines()[0]
    return why if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {why}"


def _num_values(node: yaml.Node, counted: dict[tuple[int, int], int], levels: int) -> int:
    """Count the values below a node, those of an alias each time that it stands there."""
    if (found := counted.get((id(node), levels))) is not None:
        return found
    if not levels:
        raise _problem(node, f"nested deeper than {MOST_DEPTH} levels")
    if isinstance(node, yaml.ScalarNode):
        if node.tag == INT_TAG and len(node.value) > MOST_DIGITS:
            raise _problem(node, f"a whole number of {len(node.value):,} digits")
        is_plain = node.style is None
        seen = RESOLVER.resolve(yaml.ScalarNode, node.value, (is_plain, not is_plain))
        if node.tag not in (seen, STR_TAG):  # !!int x: the builder would fail in its own words
            raise _problem(node, f"the tag {node.tag}; write the value without one")
        return 1
    items = [item if isinstance(item, tuple) else (item,) for item in node.value]  # pairs of a map
    num = 1 + sum(_num_values(child, counted, levels - 1) for item in items for child in item)
    counted[id(node), levels] = num
    return num


def _problem(node: yaml.Node, why: str) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=why, problem_mark=node.start_mark)


def _line_numbers(root: yaml.MappingNode) -> Lines:
    """Return the line of each ``(section,)`` and ``(section, key)``."""
    lines: Lines = {}
    for section, content in root.value:
        lines[(section.value,)] = section.start_mark.line + 1
        for name, _ in content.value if isinstance(content, yaml.MappingNode) else []:
            lines[(section.value, name.value)] = name.start_mark.line + 1
    return lines


def _missing_file(path: Path, kind: FileKind) -> str:
    """Describe a missing file by listing those beside it and in the folder of its kind."""
    folders = dict.fromkeys((path.parent, kind.folder))
    found = [str(file) for folder in folders for file in sorted(folder.glob("[!.]*.yaml"))]
    listing = f" and no {kind.folder}/*.yaml is near"
    if found:
        listing = f"; {kind.plural} here: {', '.join(found)}"
    what = f"is a folder, not a {kind.name} file" if path.is_dir() else "does not exist"
    return f"{kind.name} {path} {what}{listing}"
