"""Writing text with an exported model, token by token, on standard output."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from vqmoe_megatron.hf.tokenizer_files import TOKENIZER_FILE

HF_CONFIG = "config.json"


LEAST_TEMPERATURE = 1e-3  # below it fp32 holds no probability but the likeliest token's


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. ``temperature`` below 1e-3: the likeliest one."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


def stream_text(model: Path, prompt: str, sampling: Sampling) -> None:
    """Print ``prompt`` and what the model writes behind it.

    Args:
        model: a folder of ``vqmoe export --hf``, or whatever of a checkpoint that takes.
        prompt: text, at least one token of it.
        sampling: how.

    Raises:
        ValueError: for a model without such a form, or without a tokenizer.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the folder
    with _exported(model) as folder:
        if not (folder / TOKENIZER_FILE).is_file():
            raise ValueError(
                f"{model} comes without its tokenizer, whose corpus is not at hand: prepare the "
                "corpus again, and export anew"
            )
        _stream(folder, prompt, sampling)


@contextlib.contextmanager
def _exported(model: Path) -> Iterator[Path]:
    if (model / HF_CONFIG).is_file():
        yield model
        return
    from vqmoe_megatron.hf.export import export_hf

    with (
        tempfile.TemporaryDirectory() as scratch,
        contextlib.redirect_stdout(sys.stderr),  # what it says is not the text
    ):
        folder = Path(scratch) / "model"
        export_hf(model, folder)
        with contextlib.redirect_stdout(sys.__stdout__):
            yield folder


def _stream(folder: Path, prompt: str, sampling: Sampling) -> None:
    from safetensors import SafetensorError
    from transformers import PreTrainedTokenizerFast, TextStreamer
    from transformers.utils import logging

    from vqmoe_megatron.hf.modeling_vqmoe import VQMoEForCausalLM

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        # Our own class: what lies in the folder as Python is not run.
        model = VQMoEForCausalLM.from_pretrained(str(folder)).eval()
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from error
    if torch.cuda.is_available():
        model = model.cuda()
    try:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f"the prompt is not of this vocabulary: {error}") from error
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError(f"the prompt {prompt!r} holds no token of this vocabulary; give some text")
    num_tokens = inputs["input_ids"].shape[1] + sampling.max_new_tokens
    if num_tokens > (trained := model.config.max_position_embeddings):
        if model.config.position_embedding_type != "rope":
            raise ValueError(
                f"prompt and --max-new-tokens are {num_tokens} tokens, and the model has positions "
                f"for {trained}"
            )
        print(f"the model was trained on {trained} tokens at a time", file=sys.stderr)
    torch.manual_seed(sampling.seed)
    draws = {"do_sample": False}
    if sampling.temperature >= LEAST_TEMPERATURE:
        draws = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=sampling.max_new_tokens,
        streamer=TextStreamer(tokenizer),
        use_cache=model.config.memory_codes != "hidden" or not model.config.memory_layers,
        pad_token_id=0,
        top_k=0,
        **draws,
    )
