"""Reading a recipe: a YAML file plus dotted overrides becomes a checked :class:`RunConfig`.

1. Every setting is collected with its origin (``file:line`` or the override's text).
2. Unknown sections and keys are refused, with the nearest legal names.
3. Settings are laid over the defaults, later ones winning, and ``${...}`` is resolved.
4. Each value is checked against the type its dataclass declares, and against its legal range.
5. The dataclasses are built once, from the final values, so their rules never see a half-merged
   recipe; a section with a problem of steps 3 or 4 is not built, and none where 1 or 2 found one.
   Everything that is wrong is reported together in one ``ValueError``.
"""

from __future__ import annotations

import difflib
import json
import re
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml  # OmegaConf's own parser: for its error class
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.checks import setting_problem
from vqmoe_megatron.config.declared_types import alternatives, declared_types, shown
from vqmoe_megatron.config.interpolation import Unresolved, resolved
from vqmoe_megatron.config.not_offered import NOT_OFFERED
from vqmoe_megatron.config.recipe_text import (
    compose_bounded,
    parse_yaml_text,
    read_yaml_text,
    where_and_why,
)
from vqmoe_megatron.rundir.atomic import replace_file

OVERRIDE_EXAMPLE = "vq.num_codes=128"
NULLS = ("null", "Null", "NULL", "~")  # of YAML, beside nothing at all
QUOTES = ("'", '"')
URI_CREDENTIALS = re.compile(r"://\S*@")
SECTION_TYPES: dict[str, type] = declared_types(RunConfig)
# Recipes that older releases saved lack them.
LATER_SECTIONS = ("code_memory", "router", "finetune", "vision")
# Declared type of every setting, by dotted key.
LEGAL_TYPES: dict[str, Any] = {
    f"{section}.{name}": hint
    for section, section_type in SECTION_TYPES.items()
    for name, hint in declared_types(section_type).items()
}


@dataclass(frozen=True)
class Setting:
    """One value a user gave, and where: ``path:line`` or ``override 'text'``."""

    key: str  # "section.name"
    value: Any
    origin: str


def load_recipe(path: Path, overrides: list[str]) -> RunConfig:
    """Read ``path``, apply ``overrides`` in order (the last wins) and return the checked result.

    Raises ``ValueError`` for a missing or malformed file, a malformed override, an unknown section
    or key, a value of the wrong type, and every rule of a section; all problems in one message.
    """
    problems: list[str] = []
    settings = _file_settings(Path(path), problems)
    return _built(RunConfig(), settings, overrides, problems, str(path))


def apply_overrides(config: RunConfig, overrides: list[str]) -> RunConfig:
    """Return ``config`` with ``overrides`` applied in order; raises as :func:`load_recipe`."""
    return _built(config, [], overrides, [], "the overrides")


def _built(
    start: RunConfig,
    settings: list[Setting],
    overrides: list[str],
    problems: list[str],
    source: str,
) -> RunConfig:
    """Lay settings and overrides over ``start``: steps 2 to 5."""
    settings += [s for text in overrides if (s := _override_setting(text, problems)) is not None]
    origins = {setting.key: setting.origin for setting in settings}
    given = {
        f"{section}.{name}": value
        for section, content in asdict(start).items()
        for name, value in content.items()
    }
    given |= {setting.key: setting.value for setting in settings}
    is_read_whole = not problems
    values = _checked_values(resolved(given), origins, problems)
    sections: dict[str, Any] = {}
    for section in values if is_read_whole else ():
        try:
            sections[section] = SECTION_TYPES[section](**values[section])
        except ValueError as rule:
            problems.append(str(rule))
    if problems:
        raise ValueError(_report(source, problems))
    return RunConfig(**sections)


def save_recipe(config: RunConfig, path: Path) -> None:
    """Write the resolved recipe to ``path`` atomically: the old file or the new one, never a half.

    :func:`load_recipe` on the written file, without overrides, returns an equal configuration.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, OmegaConf.to_yaml(OmegaConf.create(asdict(config))))


def load_saved_recipe(path: Path) -> RunConfig:
    """Read what :func:`save_recipe` wrote.

    Raises ``ValueError`` as :func:`load_recipe`, and for an emptied or cut file, whose settings
    would otherwise be the defaults.
    """
    is_emptied = path.is_file() and not path.read_bytes().strip()
    config = RunConfig() if is_emptied else load_recipe(path, [])
    found = () if is_emptied else OmegaConf.load(path)
    missing = [s for s in SECTION_TYPES if s not in found and s not in LATER_SECTIONS]
    if missing:
        raise ValueError(f"{path} was emptied or cut: it lacks {', '.join(missing)}")
    return config


def holds_text(key: str) -> bool:
    """Tell whether the setting is declared as text, or as text or null."""
    return str in alternatives(LEGAL_TYPES.get(key))


def text_override(key: str, value: str) -> str:
    """Return the override that gives a text setting exactly ``value``, quoted where it must be.

    Raises:
        ValueError: for a value with ``${``, which would be resolved and not kept.
    """
    if "${" in value:
        raise ValueError(f"{key}={value}: ${{...}} is not resolved here; write the value itself")
    is_plain = value == value.strip() and value not in ("", *NULLS) and value[0] not in QUOTES
    return f"{key}={value if is_plain else json.dumps(value, ensure_ascii=False)}"


def flatten_config(config: RunConfig) -> dict[str, str | int | float | bool | None]:
    """Return every setting under its dotted key, lists joined by commas (for tracking)."""
    return {
        f"{section.name}.{name}": ",".join(map(str, value)) if isinstance(value, list) else value
        for section in fields(config)
        for name, value in asdict(getattr(config, section.name)).items()
    }


def _file_settings(path: Path, problems: list[str]) -> list[Setting]:
    """Return the file's settings in order; an empty section means its defaults."""
    sections, lines = parse_yaml_text(read_yaml_text(path), path, ", ".join(SECTION_TYPES))
    settings: list[Setting] = []
    for section, content in sections.items():
        origin = f"{path}:{lines.get((str(section),), 1)}"
        if section not in SECTION_TYPES:
            problems.append(f"{_unknown_section(str(section))} ({origin})")
        elif content is not None and not isinstance(content, dict):
            problems.append(
                f"section {section} must hold `key: value` lines, not {shown(content)} ({origin})"
            )
        else:
            for name, value in (content or {}).items():
                origin = f"{path}:{lines.get((section, str(name)), 1)}"
                if f"{section}.{name}" in LEGAL_TYPES:
                    settings.append(Setting(f"{section}.{name}", value, origin))
                else:
                    problems.append(f"{_unknown_key(f'{section}.{name}')} ({origin})")
    return settings


def _override_setting(text: str, problems: list[str]) -> Setting | None:
    """Return the setting of one ``section.key=value`` text, or None with its problem reported."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    origin = f"override {shown(text)}"
    if not equals:
        problems.append(f"{origin} has no `=`; write it as section.key=value: {OVERRIDE_EXAMPLE}")
        return None
    if key in SECTION_TYPES:
        problems.append(f"{origin} names a whole section; write {key}.key=value")
        return None
    if key not in LEGAL_TYPES:
        unknown = _unknown_key if key.split(".")[0] in SECTION_TYPES else _unknown_section
        problems.append(f"{unknown(key)} ({origin})")
        return None
    try:
        if holds_text(key):
            value: Any = _override_text(raw.strip())
            OmegaConf.create({"value": value})  # its ${...}, if any, is well formed
        else:
            value = deepcopy(_override_value(raw))
    except yaml.YAMLError as error:
        problems.append(f"{origin} has a malformed value: {where_and_why(error)}")
    except (OmegaConfBaseException, ValueError) as error:
        problems.append(f"{origin} has a malformed value: {str(error).splitlines()[0]}")
    else:
        return Setting(key, value, origin)
    return None


@lru_cache(maxsize=1024)  # the points of a study share most of theirs
def _override_value(raw: str) -> Any:
    """Return the value that OmegaConf reads in ``raw``; the caller copies what it changes."""
    compose_bounded(raw)
    tree: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]))
    return tree["value"]


def _override_text(raw: str) -> str | None:
    """Return the value of a text setting: as it stands, unless it is null, ~ or in quotes.

    So ``007``, ``a: b``, ``runs/study #1`` and ``&x`` are what they look like, where YAML would
    see a number, a mapping, a comment and an anchor. ``${...}`` is resolved later.
    """
    if not raw:
        raise ValueError("it is empty; write null for no value, or '' in quotes for an empty text")
    if raw in NULLS:
        return None
    if raw[0] not in QUOTES:
        return raw
    node = yaml.compose(raw, Loader=yaml.SafeLoader)
    if not isinstance(node, yaml.ScalarNode) or node.end_mark.index != len(raw):
        raise ValueError("it begins with a quote mark but is not one quoted text")
    return str(node.value)


def _checked_values(
    given: dict[str, Any], origins: dict[str, str], problems: list[str]
) -> dict[str, dict[str, Any]]:
    """Check every setting's type and range; int becomes float where declared.

    Returns the sections whose every value is legal by itself.
    """
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTION_TYPES}
    broken: set[str] = set()
    for key, hint in LEGAL_TYPES.items():
        section, name = key.split(".")
        where = origins.get(key, "default")
        value = given[key]
        if isinstance(value, Unresolved):
            problems.append(f"{key} ({where}) cannot be resolved: {value.why}")
            broken.add(section)
            continue
        if problem := setting_problem(key, value, hint):
            problems.append(f"{problem} ({where})")
            broken.add(section)
            continue
        values[section][name] = float(value) if _is_float(value, hint) else value
    return {section: values[section] for section in SECTION_TYPES if section not in broken}


def _is_float(value: Any, hint: Any) -> bool:
    return type(value) is int and int not in (kinds := alternatives(hint)) and float in kinds


def _unknown_section(key: str) -> str:
    """Describe an unknown section, with the nearest sections or, for a bare key, its full name."""
    same_name = [legal for legal in LEGAL_TYPES if legal.split(".")[1] == key.split(".")[-1]]
    near = same_name + difflib.get_close_matches(key.split(".")[0], SECTION_TYPES, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "none is near."
    return f"unknown section {key!r}: {hint} Sections: {', '.join(SECTION_TYPES)}"


def _unknown_key(key: str) -> str:
    """Describe an unknown key of a known section, with the nearest legal keys of all sections."""
    if key in NOT_OFFERED:
        return f"{key} is refused: {NOT_OFFERED[key]}"
    section, name = key.split(".", 1)
    siblings = [legal for legal in LEGAL_TYPES if legal.startswith(f"{section}.")]
    elsewhere = [legal for legal in LEGAL_TYPES if legal.split(".")[1] == name]
    near = elsewhere + difflib.get_close_matches(key, siblings, n=3, cutoff=0.6)
    if near:
        return f"unknown key {key!r}: did you mean {' or '.join(near)}?"
    names = ", ".join(legal.split(".")[1] for legal in siblings)
    return f"unknown key {key!r}: none is near. Keys of {section}: {names}"


def _report(source: str, problems: list[str]) -> str:
    """Join the problems; what stands between :// and @ may be a password and is left out."""
    problems = [URI_CREDENTIALS.sub("://***@", problem) for problem in problems]
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems in {source}:\n" + "\n".join(f"  - {p}" for p in problems)
