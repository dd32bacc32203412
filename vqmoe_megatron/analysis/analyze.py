"""``vqmoe analyze``: measures of trained models, side by side on one page.

1. Checkpoints, corpora and the output folder are judged by files alone.
2. This process becomes a world of one rank. Model by model: load, ask every part, let go.
3. The page, its plots, and all figures as JSON are written, replacing only what an earlier call
   wrote.

Megatron is imported in 2, after the CPU has been made fit for it.
"""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqmoe_megatron.analysis.tags import read_tags
from vqmoe_megatron.bench.origin import commit_in_words, origin
from vqmoe_megatron.checkpoint.inspection import CheckpointContents, inspect_checkpoint
from vqmoe_megatron.checkpoint.table_export import world_of_one
from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.recipe import load_saved_recipe
from vqmoe_megatron.data.corpus import Corpus, check_tokenizer, load_corpus
from vqmoe_megatron.rundir.file_names import CHECKPOINTS_DIR, CONFIG_FILE
from vqmoe_megatron.rundir.own_outputs import check_recorded, replace_recorded, said_as_refusal
from vqmoe_megatron.study.report.page import Page, Section, Table, html_page, markdown
from vqmoe_megatron.study.report.plot_style import report_style

if TYPE_CHECKING:
    from vqmoe_megatron.analysis.part import Findings, Part
    from vqmoe_megatron.analysis.settings import Settings
    from vqmoe_megatron.plan.layout import ParallelLayout

WRITER = "vqmoe analyze"
PART_NAMES = ("load", "routing", "collapse", "robustness", "meaning", "adaptation", "drift")
NEED_DOMAIN = {"adaptation", "drift"}
PLOT_STEMS = ("usage", "routing", "collapse", "robustness", "meaning", "adaptation", "drift")
TEXT_NAMES = ("analysis.json", "report.md", "index.html")  # written in this order
MAX_EARLIER = 3  # checkpoints of a run that its choices are compared with
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is to be analysed; see :func:`check_request`."""

    checkpoints: list[CheckpointContents]
    names: list[str]  # on the page
    corpus: Corpus
    domain: Corpus | None
    parts: tuple[str, ...]
    out: Path


@dataclass(frozen=True)
class Analysis:
    """What was found and where it is written."""

    folder: Path
    content: dict[str, Any]  # of analysis.json

    @property
    def page(self) -> Path:
        """The HTML page."""
        return self.folder / "index.html"


def check_request(
    paths: Sequence[Path],
    out: Path,
    settings: Settings,
    parts: Sequence[str] | None = None,
    data: Path | None = None,
    domain: Path | None = None,
) -> Request:
    """Judge everything by files alone; nothing is written, no rank started.

    Args:
        paths: run directories, their checkpoints folders, or iter_ folders; of any layout.
        out: the folder of the page: new, or as an earlier call left it.
        settings: the protocol.
        parts: names of ``PART_NAMES``; None: all, those that need a domain only with one.
        data: the corpus to read; None: the one in the first checkpoint's recipe.
        domain: another corpus.

    Raises:
        ValueError: for checkpoints, corpora, parts or an ``out`` that cannot be used.
    """
    if os.path.lexists(out) and not out.is_dir():
        raise ValueError(f"{out} is in the way: it is no directory; choose another --out")
    check_recorded(out, (*TEXT_NAMES, *(f"{name}.png" for name in PLOT_STEMS)), WRITER)
    checkpoints = [inspect_checkpoint(path) for path in paths]
    recipes = [load_saved_recipe(Path(found.folder) / CONFIG_FILE) for found in checkpoints]
    for found, recipe in zip(checkpoints, recipes, strict=True):
        _check_model(found.folder, recipe)
    if parts is not None:
        for name in parts:
            if name not in PART_NAMES:
                raise ValueError(f"--parts {name}: the parts are {', '.join(PART_NAMES)}")
            if name in NEED_DOMAIN and domain is None:
                raise ValueError(f"--parts {name} needs --domain PATH, another prepared corpus")
    chosen = tuple(
        name
        for name in PART_NAMES
        if (name in parts if parts is not None else domain is not None or name not in NEED_DOMAIN)
    )
    corpus = load_corpus(data or Path(recipes[0].data.path))
    corpora = {"--data": corpus}
    if domain is not None:
        corpora["--domain"] = load_corpus(domain)
    for found in corpora.values():
        found.split(settings.split)
        for contents in checkpoints:
            check_tokenizer(found, None, contents.tokenizer)
    if set(chosen) & NEED_DOMAIN:
        for found in corpora.values():
            found.split("train")
    if settings.tags is not None and "meaning" in chosen:
        read_tags(settings.tags, corpus, settings.split)
    names = unique_names(checkpoints)
    return Request(checkpoints, names, corpus, corpora.get("--domain"), chosen, out)


def _check_model(folder: str, recipe: RunConfig) -> None:
    """Raise ``ValueError`` for what is no language model."""
    if recipe.train.task != "pretrain":
        raise ValueError(
            f"{folder} was trained with train.task={recipe.train.task}; vqmoe analyze reads "
            "language models, which predict the next token (train.task=pretrain)"
        )


def unique_names(checkpoints: Iterable[CheckpointContents]) -> list[str]:
    """What each is called on the page: its run directory and iteration."""
    names: list[str] = []
    for contents in checkpoints:
        folder = Path(contents.folder).parent
        run = folder.parent if folder.name == CHECKPOINTS_DIR else folder
        name = f"{run.name} {contents.iteration}"
        number = 1 + sum(known == name or known.startswith(f"{name} (") for known in names)
        names.append(name if number == 1 else f"{name} ({number})")
    return names


def analyze(request: Request, settings: Settings, say: Say) -> Analysis:
    """Measure all models, and write the page. Makes this process a world of one rank and ends it.

    ``say`` is told the progress.

    Raises:
        ValueError: for several ranks, weights that are not finite, and an ``out`` that cannot be
            written.
    """
    with world_of_one(RunConfig(), "analyze", say) as layout:
        return analyze_here(request, settings, layout, say)


def analyze_here(
    request: Request, settings: Settings, layout: ParallelLayout, say: Say
) -> Analysis:
    """Steps 2 and 3, in a world of one rank whose process groups stand."""
    from vqmoe_megatron.analysis.parts.adaptation import ADAPTATION
    from vqmoe_megatron.analysis.parts.collapse import COLLAPSE
    from vqmoe_megatron.analysis.parts.drift import DRIFT
    from vqmoe_megatron.analysis.parts.load import LOAD
    from vqmoe_megatron.analysis.parts.meaning import MEANING
    from vqmoe_megatron.analysis.parts.robustness import ROBUSTNESS
    from vqmoe_megatron.analysis.parts.routing import ROUTING

    known = (LOAD, ROUTING, COLLAPSE, ROBUSTNESS, MEANING, ADAPTATION, DRIFT)
    parts = [part for part in known if part.name in request.parts]
    findings: dict[str, dict[str, Findings]] = {part.name: {} for part in parts}
    models: dict[str, dict[str, Any]] = {}
    for name, contents in zip(request.names, request.checkpoints, strict=True):
        models[name] = _measure(name, contents, request, settings, layout, parts, findings, say)
        gc.collect()  # of several models one at a time
    content = _content(request, settings, models, findings)
    with report_style():
        sections = [part.section(findings[part.name], settings) for part in parts]
    page = _page(request, content, sections)
    files = {plot.file_name: plot.png for section in page.sections for plot in section.plots}
    texts = (json.dumps(content, indent=1) + "\n", markdown(page), html_page(page))
    files |= {name: text.encode() for name, text in zip(TEXT_NAMES, texts, strict=True)}
    with said_as_refusal(request.out):
        request.out.mkdir(parents=True, exist_ok=True)
        plots = [f"{stem}.png" for stem in PLOT_STEMS]
        replace_recorded(request.out, files, plots, WRITER)
    return Analysis(request.out, content)


def _measure(
    name: str,
    contents: CheckpointContents,
    request: Request,
    settings: Settings,
    layout: ParallelLayout,
    parts: Sequence[Part],
    findings: dict[str, dict[str, Findings]],
    say: Say,
) -> dict[str, Any]:
    """Ask every part about one model; return what is said of the model itself."""
    from vqmoe_megatron.analysis.loaded_model import load_model
    from vqmoe_megatron.analysis.observation import Observation, observe
    from vqmoe_megatron.analysis.part import Subject
    from vqmoe_megatron.analysis.text import Text

    folder = Path(contents.folder)
    seq_length = load_saved_recipe(folder / CONFIG_FILE).model.seq_length

    def text(corpus: Corpus | None, split: str) -> Text | None:
        has_split = corpus is not None and split in corpus.splits
        return Text(corpus, split, seq_length, settings.num_tokens) if has_split else None

    read = text(request.corpus, settings.split)
    earlier: dict[int, Observation] = {}
    if "routing" in request.parts:
        for other in _earlier(contents):
            say(f"{name}: choices of {other.name}")
            model = load_model(name, other, layout)
            earlier[model.iteration] = observe(model, read.batches())
    model = load_model(name, folder, layout)
    subject = Subject(
        model,
        settings,
        read,
        text(request.domain, settings.split),
        text(request.domain, "train"),
        text(request.corpus, "train"),
        earlier,
    )
    for part in parts:
        began = time.monotonic()
        findings[part.name][name] = part.measure(subject)
        say(f"{name}: {part.name}, {time.monotonic() - began:.1f} s")
    return {
        "folder": from_here(Path(contents.folder)),
        "iteration": contents.iteration,
        "kind": model.kind,
        "loss": subject.seen.loss,
        "num_parameters": contents.num_parameters,
        "recipe_sha256": contents.recipe_sha256,
        "text": f"{read.windows.num_scored_tokens:,} tokens, {read.windows.description}",
    }


def from_here(folder: Path) -> str:
    """As seen from the working directory: a page may be read by others, on other machines."""
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def _earlier(contents: CheckpointContents) -> list[Path]:
    """The latest of the run's complete checkpoints before this one, oldest first."""
    folder = Path(contents.folder)
    names = [found.name for found in contents.checkpoints if found.name < folder.name]
    return [folder.parent / name for name in names[-MAX_EARLIER:]]


def _content(
    request: Request,
    settings: Settings,
    models: dict[str, dict[str, Any]],
    findings: dict[str, dict[str, Findings]],
) -> dict[str, Any]:
    return {
        **origin(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": asdict(settings) | {"tags": settings.tags and settings.tags.name},
        "corpus": {"path": str(request.corpus.path), "sha256": request.corpus.fingerprint},
        "domain": None
        if request.domain is None
        else {"path": str(request.domain.path), "sha256": request.domain.fingerprint},
        "models": _finite(models),
        "parts": _finite(findings),
    }


def _finite(value: Any) -> Any:
    """``value`` with None for NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _page(request: Request, content: dict[str, Any], sections: Sequence[Section]) -> Page:
    facts = [("corpus", f"{request.corpus.path}, split {content['settings']['split']}")]
    if request.domain is not None:
        facts.append(("other domain", str(request.domain.path)))
    else:
        left_out = ", ".join(name for name in PART_NAMES if name in NEED_DOMAIN)
        facts.append(("left out", f"{left_out}: they need another domain (--domain PATH)"))
    not_asked = [n for n in PART_NAMES if n not in request.parts and n not in NEED_DOMAIN]
    if not_asked:
        facts.append(("not asked for", ", ".join(not_asked)))
    facts += [
        ("seed", str(content["settings"]["seed"])),
        ("measured", f"{content['date']}, {content['machine']['cores']} cores, in fp32"),
        ("commit", commit_in_words(content)),
    ]
    cells = [
        [name, model["kind"], f"{model['num_parameters']:,}", _loss(model), model["folder"]]
        for name, model in content["models"].items()
    ]
    read = {model["text"] for model in content["models"].values()}
    headings = ["model", "what it is", "parameters", "loss (nats/token)", "checkpoint"]
    table = Table(headings, cells, f"Read in each pass: {'; '.join(sorted(read))}.")
    return Page("Analysis", facts, [Section("Models", tables=[table]), *sections])


def _loss(model: dict[str, Any]) -> str:
    return "not finite" if model["loss"] is None else f"{model['loss']:.4f}"
