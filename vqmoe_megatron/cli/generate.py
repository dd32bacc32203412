"""``vqmoe generate``: text of a checkpoint or an export, as it comes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vqmoe_megatron.runtime.optional_packages import require
from vqmoe_megatron.runtime.versions import check_versions


def generate(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="directory of vqmoe export --hf, or a run directory, its checkpoints folder or "
            "one iter_ folder",
        ),
    ],
    prompt: Annotated[str, typer.Argument(help="text to go on from; - reads standard input")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens to write")] = 200,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="of the softmax; 0 takes the likeliest token")
    ] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="share of probability to draw from")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="of the draws; the same text for the same seed")] = 1,
) -> None:
    """Write text with a trained model, token by token.

    A checkpoint is exported into a temporary directory first; to write often,
    export it once. Needs the package transformers.

    Example: vqmoe generate runs/quickstart "def read(path):" --temperature 0.5
    """
    check_versions()
    require("transformers", "vqmoe generate")
    from vqmoe_megatron.hf.generation import Sampling, stream_text

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise ValueError("an empty prompt: a model goes on from at least one token")
    stream_text(model, text, Sampling(max_new_tokens, temperature, top_p, seed))
