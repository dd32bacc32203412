"""Sources for upcycling and the upcycling itself, in a rank of a ``RankPool``; for tests."""

from __future__ import annotations

import argparse
from pathlib import Path


class OfMegatron:
    """A class that a pickle names and nobody who reads it knows."""


def upcycle_in_rank(source: str, recipe: str, overrides: list[str], out: str, tolerance=None):
    """Upcycle here; return what was measured. ``tolerance`` takes the place of the module's."""
    from vqmoe_megatron.config.recipe import load_recipe
    from vqmoe_megatron.plan.layout import ParallelLayout
    from vqmoe_megatron.upcycle import upcycle

    config = load_recipe(Path(recipe), overrides)
    allowed = upcycle.check_upcycling(Path(source), config, Path(out))
    if tolerance is not None:
        upcycle.FP32_TOLERANCE = tolerance
    done = upcycle.upcycle_here(allowed, ParallelLayout.from_config(allowed.evaluated, 1))
    return {
        "source_loss": done.source_scores["val/loss"],
        "loss": done.scores["val/loss"],
        "scale": done.output_scale,
        "dense_layers": done.dense_layers,
        "copied": done.num_copied_tensors,
        "sampled": done.sampled_tokens,
        "notes": allowed.notes,
    }


def stored_tensors(folder: str) -> dict:
    """All tensors of a checkpoint by name, without the optimizer's."""
    import torch
    from torch.distributed import checkpoint

    from vqmoe_megatron.checkpoint.metadata import read_stored_content

    stored = read_stored_content(Path(folder)).tensors
    wanted = {
        tensor.name: torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
        for tensor in stored
        if not tensor.name.startswith(("optimizer", "random_state"))
    }
    checkpoint.load(wanted, storage_reader=checkpoint.FileSystemReader(folder))
    return wanted


def save_megatrons(
    recipe: str, overrides: list[str], save_dir: str, num_experts: int | None, arguments: dict
) -> float:
    """Train Megatron-core's own GPTModel for a few steps of the recipe's text and sizes, save it as
    Megatron-LM does, with ``arguments`` in common.pt, and return its validation loss.

    Dense for ``num_experts`` None, else with ``SequentialMLP`` behind Megatron's own dispatcher.
    """
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from vqmoe_megatron.checkpoint.random_state import seed_generators
    from vqmoe_megatron.config.recipe import load_recipe
    from vqmoe_megatron.data.corpus import load_corpus
    from vqmoe_megatron.runtime.cpu_compat.missing_names import name_missing_functions
    from vqmoe_megatron.tasks.pretrain import Pretrain

    name_missing_functions()
    config = load_recipe(Path(recipe), [*overrides, f"train.output_dir={save_dir}/order"])
    settings = config.model
    seed_generators(7)
    experts = {}
    if num_experts is not None:
        experts = {
            "num_moe_experts": num_experts,
            "moe_router_topk": settings.moe_router_topk,
            "moe_router_pre_softmax": settings.moe_router_pre_softmax,
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
            "moe_token_dispatcher_type": "alltoall",
            "moe_ffn_hidden_size": settings.moe_ffn_hidden_size,
        }
    transformer = TransformerConfig(
        num_layers=settings.num_layers,
        hidden_size=settings.hidden_size,
        num_attention_heads=settings.num_attention_heads,
        ffn_hidden_size=settings.moe_ffn_hidden_size,
        gated_linear_unit=settings.gated_linear_unit,
        activation_func=torch.nn.functional.silu
        if settings.activation_func == "silu"
        else torch.nn.functional.gelu,
        add_bias_linear=settings.add_bias_linear,
        normalization=settings.normalization,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        init_method_std=0.1,
        **experts,
    )
    model = GPTModel(
        transformer,
        get_gpt_layer_local_spec(num_experts, False, normalization=settings.normalization),
        vocab_size=256,
        max_sequence_length=settings.seq_length,
        position_embedding_type="rope",
        rotary_base=settings.rotary_base,
        share_embeddings_and_output_weights=not settings.untie_embeddings_and_output_weights,
    )
    task = Pretrain(config, load_corpus(Path(config.data.path)))
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    (batches,) = task.training_iterators(1, 0, 0)

    def losses(batch) -> torch.Tensor:
        return model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    for _ in range(6):
        adam.zero_grad()
        losses(next(batches)).mean().backward()
        adam.step()
    folder = Path(save_dir) / "iter_0000006"
    folder.mkdir(parents=True)
    state = dict(model.sharded_state_dict())
    if arguments:
        state["args"] = argparse.Namespace(**arguments, attention_backend=OfMegatron())
    state["iteration"] = 6
    dist_checkpointing.save(state, str(folder))
    (Path(save_dir) / "latest_checkpointed_iteration.txt").write_text("6")
    model.eval()
    total, num_tokens = 0.0, 0.0
    with torch.no_grad():
        for batch in task.evaluation_batches():
            mask = batch["loss_mask"].double()
            total += float((losses(batch).double() * mask).sum())
            num_tokens += float(mask.sum())
    return total / num_tokens
