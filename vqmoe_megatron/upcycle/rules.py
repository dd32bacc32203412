"""Which recipes compute a source's function exactly at their start; the others, with the reason.

Settings only. N experts, k chosen per token. What a layer has beside its experts must be silent:

- code memory of learned rows: rows start at zero.
- ``path=dual`` with ``combine=sigmoid`` and ``norm=separate``: y = y_c + s y_d leaves y_c as it is,
  and the norm behind the codes' path starts with gain zero.
- ``path=filled`` with ``fill_values=direct``: rows start at zero.

A dense layer becomes N copies of its MLP. Of probabilities taken before the choice
(``moe_router_pre_softmax``) k of N equal ones sum to k / N, so the copies' outputs are scaled by
N / k; those taken after it sum to one.
"""

from __future__ import annotations

from collections.abc import Iterator

from vqmoe_megatron.config import CodeMemoryConfig, ModelConfig, RunConfig, VQConfig
from vqmoe_megatron.config.router_rules import other_router

# What decides the function that a model computes; equal in source and recipe.
FUNCTION_SETTINGS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "moe_ffn_hidden_size",
    "activation_func",
    "gated_linear_unit",
    "add_bias_linear",
    "add_qkv_bias",
    "normalization",
    "layernorm_epsilon",
    "norm_placement",
    "position_embedding_type",
    "rotary_base",
    "untie_embeddings_and_output_weights",
    "make_vocab_size_divisible_by",
)
ROUTER_SETTINGS = (
    "num_moe_experts",
    "moe_layer_freq",
    "ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_router",
    "moe_router_topk",
    "moe_router_pre_softmax",
    "moe_router_dtype",
)


def check_target(target: RunConfig) -> None:
    """Raise ``ValueError``, listing everything, for a recipe that cannot start silent."""
    problems = [
        *_memory_problems(target.code_memory),
        *_path_problems(target.vq, target.model),
    ]
    if target.vision.is_on:
        problems.append(
            f"vision.image_size={target.vision.image_size}: only models of text are compared here; "
            "train a model of images from its start"
        )
    if target.model.attention != "standard":
        problems.append(
            f"model.attention={target.model.attention}: sources are read with Megatron's standard "
            "attention; upcycle without it"
        )
    if (problem := other_router(target, "upcycling", "use topk")) is not None:
        problems.append(problem)
    if target.model.fp8 is not None:
        problems.append(
            f"model.fp8={target.model.fp8}: Transformer Engine's experts round weights when they "
            "are used, so no loss would be equal; upcycle without it"
        )
    if problems:
        raise ValueError(
            "this recipe cannot start as the source's function:\n  - " + "\n  - ".join(problems)
        )


def check_same_function(source: RunConfig, target: RunConfig) -> None:
    """Raise ``ValueError`` for settings by which a recipe's model differs from that of ``source``.

    ``source`` is the recipe stored with a checkpoint of ours.
    """
    problems = list(_source_problems(source))
    names = list(FUNCTION_SETTINGS)
    if source.model.num_moe_experts > 1:
        names += ROUTER_SETTINGS
    if target.model.position_embedding_type == "learned_absolute":
        names.append("seq_length")
    for name in names:
        theirs, ours = getattr(source.model, name), getattr(target.model, name)
        if theirs == ours:
            continue
        advice = "set it back"
        if name == "num_moe_experts":
            advice += "; other numbers of experts are what checkpoint.remap=true makes"
        problems.append(f"model.{name}: source {theirs!r}, recipe {ours!r}; {advice}")
    if problems:
        raise ValueError(
            "the source cannot become this recipe's model:\n  - " + "\n  - ".join(problems)
        )


def check_becomes_experts(model: ModelConfig) -> None:
    """Raise ``ValueError`` for a router that cannot be started so that copies give their output."""
    if model.moe_router != "topk":
        raise ValueError(
            f"model.moe_router={model.moe_router}: of a dense source only moe_router=topk can be "
            "started so that the weights of equal experts are known"
        )


def output_scale(model: ModelConfig) -> float:
    """What the copies of a dense MLP multiply their outputs by, so that their weighted sum is its.

    For equal probabilities of all experts; see the top of this file.
    """
    if model.num_moe_experts == 1 or not model.moe_router_pre_softmax:
        return 1.0
    return model.num_moe_experts / model.moe_router_topk


def _memory_problems(memory: CodeMemoryConfig) -> Iterator[str]:
    if memory.is_on and memory.values == "experts":
        yield (
            "code_memory.values=experts: what a token reads are outputs of experts on learned "
            "inputs, which are not zero; use values=direct, whose rows start at zero"
        )


def _path_problems(vq: VQConfig, model: ModelConfig) -> Iterator[str]:
    if vq.path == "discrete":
        yield (
            "vq.path=discrete: every output would be that of a code, not of the token; use "
            "path=continuous with a code memory, or path=dual or filled as below"
        )
    if vq.path == "dual" and (vq.combine, vq.norm) != ("sigmoid", "separate"):
        yield (
            f"vq.path=dual with vq.combine={vq.combine}, vq.norm={vq.norm}: softmax weighs the "
            "experts' output by less than one, and only a norm of its own behind the codes' path "
            "can start it at zero; use combine=sigmoid and norm=separate"
        )
    if vq.path != "filled":
        return
    if vq.fill_values != "direct" or vq.threshold_routing:
        yield (
            f"vq.path=filled with vq.fill_values={vq.fill_values}, vq.threshold_routing="
            f"{str(vq.threshold_routing).lower()}: experts would answer that the source does not "
            "ask, or fewer would see the token; use fill_values=direct, whose rows start at zero, "
            "and threshold_routing=false"
        )
    if not model.moe_router_pre_softmax:
        yield (
            "vq.path=filled with model.moe_router_pre_softmax=false: its weights are probabilities "
            "among all experts; use moe_router_pre_softmax=true"
        )


def _source_problems(source: RunConfig) -> Iterator[str]:
    if source.vq.path != "continuous" or source.code_memory.is_on:
        yield (
            f"the source is a VQMoE already (vq.path={source.vq.path}, code_memory.num_rows="
            f"{source.code_memory.num_rows}); go on from it with checkpoint.load=DIR, with "
            "checkpoint.remap=true for other numbers of codes or experts"
        )
