"""The ``config.json`` of an exported model, from its recipe."""

from __future__ import annotations

from typing import Any

from vqmoe_megatron import __version__
from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.memory_codebooks import hidden_quantizer
from vqmoe_megatron.plan.parameters import padded_vocab_size

MODEL_FILE = "modeling_vqmoe"


def hf_config(config: RunConfig, code_dim: int, norms_sum: bool) -> dict[str, Any]:
    """Return the keys of ``VQMoEConfig``, and where Transformers finds its class.

    Args:
        config: a recipe that :func:`check_has_hf_form` takes, its vocabulary known.
        code_dim: width of a code; 0 without a discrete path.
        norms_sum: whether the sum of a token's rows is normed.
    """
    model, vq, memory = config.model, config.vq, config.code_memory
    heads = model.num_attention_heads
    head_dim = model.kv_channels or model.hidden_size // heads
    moe_layers = [n for n in range(model.num_layers) if n % model.moe_layer_freq == 0]
    found = {
        "model_type": "vqmoe",
        "architectures": ["VQMoEForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODEL_FILE}.VQMoEConfig",
            "AutoModel": f"{MODEL_FILE}.VQMoEModel",
            "AutoModelForCausalLM": f"{MODEL_FILE}.VQMoEForCausalLM",
        },
        "written_by": f"vqmoe_megatron {__version__}",
        "dtype": "bfloat16" if model.bf16 else "float32",
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": model.num_query_groups or heads,
        "head_dim": head_dim,
        "max_position_embeddings": model.seq_length,
        "position_embedding_type": model.position_embedding_type,
        "rotary_base": float(model.rotary_base),
        "normalization": model.normalization,
        "layernorm_epsilon": model.layernorm_epsilon,
        "activation_func": model.activation_func,
        "gated_linear_unit": model.gated_linear_unit,
        "add_bias_linear": model.add_bias_linear,
        "add_qkv_bias": model.add_qkv_bias,
        "ffn_hidden_size": model.ffn_hidden_size or 4 * model.hidden_size,
        "moe_layers": moe_layers,
        "num_moe_experts": model.num_moe_experts,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_router_topk": model.moe_router_topk,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_dtype": model.moe_router_dtype,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "path": vq.path,
    }
    if vq.path != "continuous":
        found |= {
            "combine": vq.combine,
            "quantizer": vq.quantizer,
            "num_code_slices": vq.num_code_slices,
            "num_codes": vq.num_codes,
            "code_dim": code_dim,
            "norms_sum_of_slices": norms_sum,
        }
    if vq.path == "filled":
        found |= {
            "num_fill_experts": vq.num_fill_experts,
            "threshold_routing": vq.threshold_routing,
        }
    if memory.is_on:
        of_hidden = memory.codes == "hidden"
        found |= {
            "memory_layers": [n for n in moe_layers if memory.carries(n + 1)],
            "memory_codes": memory.codes,
            "memory_num_codes": hidden_quantizer(vq, memory).num_codes if of_hidden else 0,
            "memory_num_rows": memory.num_rows,
            "memory_max_order": memory.max_order,
            "memory_num_context_codes": memory.num_context_codes,
            "memory_context_decay": memory.context_decay,
            "memory_context_dim": memory.context_dim if memory.num_context_codes else 0,
            "memory_gate": memory.gate,
            "memory_vocab_size": padded_vocab_size(model),
        }
    return found
