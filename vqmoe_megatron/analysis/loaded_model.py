"""A checkpoint as a model that one process evaluates, whatever layout wrote it.

Weights are in fp32 whatever they were trained in, so that what is measured is the model and not the
rounding of its evaluation. Nothing is written into the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from vqmoe_megatron.checkpoint.content import check_format_version, read_content, readable
from vqmoe_megatron.checkpoint.folder import FOLDER_PATTERN, stored_tokenizer
from vqmoe_megatron.checkpoint.random_state import seed_generators
from vqmoe_megatron.config import ParallelConfig, RunConfig
from vqmoe_megatron.engines.megatron.model import build_chunks, build_transformer_config
from vqmoe_megatron.moe.layer import VQMoELayer
from vqmoe_megatron.plan.layout import ParallelLayout


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation, and where it comes from."""

    name: str  # on the page
    folder: Path
    config: RunConfig  # as it is built here: one rank, fp32
    module: torch.nn.Module  # Megatron's GPTModel

    @property
    def iteration(self) -> int:
        """That it was saved at."""
        return int(FOLDER_PATTERN.match(self.folder.name)[1])

    @property
    def layers(self) -> list[VQMoELayer]:
        """Those with experts, in order."""
        return [part for part in self.module.modules() if isinstance(part, VQMoELayer)]

    @property
    def kind(self) -> str:
        """What the model is, in words."""
        model, vq = self.config.model, self.config.vq
        if model.num_moe_experts == 1:
            kind = "dense"
        elif vq.path == "discrete":
            kind = f"{model.num_moe_experts} experts by code"
        else:
            kind = (
                f"{model.num_moe_experts} experts, {model.moe_router} top-{model.moe_router_topk}"
            )
        if vq.path != "continuous":
            kind += f", path {vq.path}, {vq.num_codes} codes"
        if self.config.code_memory.is_on:
            kind += ", code memory"
        if model.attention == "transformer_xl":
            kind += ", Transformer-XL, each window read without the text before"
        return kind

    def at_start(self) -> dict[str, torch.Tensor]:
        """A copy of all weights and buffers, to go back to with :meth:`go_back`."""
        state = self.module.state_dict()
        return {name: v.clone() if torch.is_tensor(v) else v for name, v in state.items()}

    def go_back(self, start: dict[str, torch.Tensor]) -> None:
        """Be again as :meth:`at_start` found it, in evaluation and without gradients."""
        self.module.load_state_dict(start)
        self.module.zero_grad(set_to_none=True)
        self.module.eval()


def analysed_config(folder: Path) -> RunConfig:
    """Return the recipe of an ``iter_`` folder as its model is built here.

    Raises:
        ValueError: for a damaged checkpoint, and one of another release.
    """
    content = read_content(folder)
    check_format_version(folder, content)
    config = content.config
    vocab_size = config.model.vocab_size or int(stored_tokenizer(folder)["vocab_size"])
    # Gradients are asked of single layers, which recomputation does not allow.
    plain = {"bf16": False, "fp8": None, "recompute_granularity": None, "recompute_method": None}
    plain |= {"recompute_num_layers": None, "recompute_modules": None}
    plain |= {"memory_length_tokens": 0}  # windows lie anywhere: none is the text before another
    vq = config.vq
    if vq.path != "continuous":  # kept tables end with a schedule's step; there is none here
        vq = replace(vq, table_per_step=False, overlap_table=False)
    return replace(
        config,
        model=replace(config.model, vocab_size=vocab_size, **plain),
        vq=vq,
        parallel=ParallelConfig(),
        train=replace(config.train, layout_independent_init=False),  # weights are loaded
    )


def load_model(name: str, folder: Path, layout: ParallelLayout) -> LoadedModel:
    """Build and fill the model of an ``iter_`` folder.

    ``layout`` is of one rank, whose process groups stand. Communicates over that world.

    Raises:
        ValueError: as :func:`analysed_config`, and for tensors that cannot be read or are not
            finite.
    """
    config = analysed_config(folder)
    seed_generators(config.train.seed)
    (module,) = build_chunks(config, build_transformer_config(config, layout), layout)
    with readable(folder), torch.no_grad():
        loaded = dist_checkpointing.load({"model": module.sharded_state_dict()}, str(folder))
    module.load_state_dict(loaded["model"])
    broken = [name for name, p in module.named_parameters() if not bool(p.isfinite().all())]
    if broken:
        raise ValueError(
            f"{folder} holds weights that are not finite ({', '.join(broken[:3])}): nothing can be "
            "measured; give an earlier checkpoint of the run"
        )
    module.eval()
    return LoadedModel(name, folder, config, module)
