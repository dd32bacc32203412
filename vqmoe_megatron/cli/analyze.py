"""``vqmoe analyze``: the command, and what it prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from vqmoe_megatron.runtime.optional_packages import require
from vqmoe_megatron.runtime.versions import check_versions


def analyze(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="run directories, checkpoints folders, or iter_ folders; of any layout",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="folder of the page; its own page is replaced")
    ] = Path("analysis"),
    parts: Annotated[
        str | None,
        typer.Option(
            help="of load, routing, collapse, robustness, meaning, adaptation, drift; with commas"
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="corpus to read; default: the first recipe's data.path"),
    ] = None,
    domain: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="another prepared corpus, in the same tokens"),
    ] = None,
    split: Annotated[str, typer.Option(help="of both corpora, to read")] = "valid",
    num_tokens: Annotated[int, typer.Option(min=1, help="read in each pass")] = 8192,
    seed: Annotated[int, typer.Option(min=0, help="of noise, corruption and shuffles")] = 1234,
    tags: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="a tag per line for every token of the split"),
    ] = None,
    adapt_batches: Annotated[int, typer.Option(min=1, help="part adaptation: trained on")] = 8,
    adapt_lr: Annotated[float, typer.Option(help="part adaptation: learning rate")] = 1e-3,
    drift_steps: Annotated[int, typer.Option(min=1, help="part drift: from one domain on")] = 12,
    as_json: Annotated[bool, typer.Option("--json", help="print all figures as JSON")] = False,
) -> None:
    """Measure trained models, side by side on one page.

    load: use of experts and codes. routing: do tokens keep their experts, over
    the run's checkpoints and under noise. collapse: ranks of outputs, experts
    and gradients. robustness: corrupted tokens, noise, another domain. meaning:
    what codes say about tokens. adaptation: a few batches of another domain.
    drift: codebooks that follow one. The last two, and robustness to a domain,
    need --domain. One process; nothing is written into a checkpoint.

    Example: vqmoe analyze runs/quickstart runs/smoe --out analysis/quickstart
    """
    check_versions()
    require("matplotlib", "vqmoe analyze")
    require("scipy", "vqmoe analyze")
    from vqmoe_megatron.analysis.analyze import analyze as analyzed
    from vqmoe_megatron.analysis.analyze import check_request
    from vqmoe_megatron.analysis.settings import Settings

    if not adapt_lr > 0:
        raise ValueError(f"--adapt-lr {adapt_lr} must be above 0")
    settings = Settings(
        num_tokens=num_tokens,
        seed=seed,
        split=split,
        adapt_batches=adapt_batches,
        adapt_lr=adapt_lr,
        drift_steps=drift_steps,
        tags=tags,
    )
    names = None if parts is None else [name.strip() for name in parts.split(",")]
    request = check_request(checkpoints, out, settings, names, data, domain)

    def say(text: str) -> None:
        print(text, file=sys.stderr if as_json else sys.stdout, flush=True)

    done = analyzed(request, settings, say)
    if as_json:
        print(json.dumps(done.content, indent=1))
    else:
        print(f"page: {done.page}")
