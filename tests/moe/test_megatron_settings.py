"""Every setting of Megatron's about experts, routing or activations is honoured or refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe import megatron_settings

# Fields of other modules: attention, embeddings, pipelines, communication, inference. A new field
# of Megatron's fails the first test until somebody has looked at what it asks of a MoE layer.
OTHERS = """
_cpu_offloading_context account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
add_bias_linear add_qkv_bias apply_query_key_layer_scaling apply_residual_connection_post_layernorm
apply_rope_fusion async_tensor_model_parallel_allreduce attention_backend attention_dropout
attention_output_gate attention_softmax_in_fp32 autocast_dtype barrier_with_L1_time batch_p2p_comm
batch_p2p_sync bf16 bias_activation_fusion bias_dropout_fusion calculate_per_token_loss
clone_scatter_output_in_embedding config_logger_dir cp_comm_type cpu_offloading
cpu_offloading_activations cpu_offloading_double_buffering cpu_offloading_num_layers
cpu_offloading_weights cross_entropy_fusion_impl cross_entropy_loss_fusion cuda_graph_impl
cuda_graph_retain_backward_graph cuda_graph_scope cuda_graph_use_single_mempool
cuda_graph_warmup_steps deallocate_pipeline_outputs defer_embedding_wgrad_compute deterministic_mode
disable_bf16_reduced_precision_matmul disable_parameter_transpose_cache
distribute_saved_activations dsa_indexer_head_dim dsa_indexer_loss_coeff dsa_indexer_n_heads
dsa_indexer_topk dsa_indexer_use_sparse_loss embedding_init_method embedding_init_method_std
enable_autocast enable_cuda_graph ep_overlap_early_attn_memory_release
experimental_attention_variant external_cuda_graph ffn_hidden_size finalize_model_grads_func
fine_grained_activation_offloading first_last_layers_bf16 flash_decode fp32_residual_connection
fp4_param fp4_quantizer_factory fp4_recipe fp8_amax_compute_algo fp8_amax_history_len
fp8_dot_product_attention fp8_interval fp8_margin fp8_multi_head_attention fp8_param
fp8_quantizer_factory fp8_recipe fp8_wgrad fused_single_qkv_rope grad_scale_func grad_sync_func
gradient_accumulation_fusion heterogeneous_block_specs hetereogenous_dist_checkpoint
hidden_dropout hidden_size hierarchical_context_parallel_sizes inference_fuse_tp_communication
inference_rng_tracker inference_sampling_seed init_method init_method_std is_hybrid_model
kitchen_attention_backend kv_channels layernorm_epsilon layernorm_zero_centered_gamma
linear_attention_freq linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads
linear_num_value_heads linear_value_head_dim log_max_attention_logit mamba_head_dim mamba_num_groups
mamba_num_heads mamba_state_dim masked_softmax_fusion max_seqlen_per_dp_cp_rank
memory_efficient_layer_norm microbatch_group_size_per_vp_stage min_offloaded_tensor_size
mlp_chunks_for_prefill mrope_section mtp_loss_scaling_factor mtp_num_layers mtp_standalone
multi_latent_attention no_rope_freq no_sync_func normalization num_attention_heads num_layers
num_layers_at_end_in_bf16 num_layers_at_start_in_bf16 num_layers_in_first_pipeline_stage
num_layers_in_last_pipeline_stage num_microbatches_with_partial_activation_checkpoints
num_query_groups output_layer_init_method overlap_p2p_comm overlap_p2p_comm_warmup_flush
param_sync_func params_dtype persist_layer_norm pipeline_dtype pipeline_model_parallel_comm_backend
pipeline_model_parallel_layout pipeline_model_parallel_size qk_clip qk_clip_alpha qk_clip_threshold
qk_l2_norm qk_layernorm recompute_granularity recompute_method recompute_num_layers
rotary_interleaved sequence_parallel softmax_scale softmax_type symmetric_ar_type
tensor_model_parallel_size test_mode timers tp_comm_atomic_ag tp_comm_atomic_rs
tp_comm_bootstrap_backend tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_overlap tp_comm_overlap_ag
tp_comm_overlap_disable_fc1 tp_comm_overlap_disable_qkv tp_comm_overlap_rs
tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs tp_only_amax_red transformer_impl
use_inference_optimized_layers use_kitchen_attention use_mamba_mem_eff_path use_ring_exchange_p2p
use_te_rng_tracker variable_seq_lengths virtual_pipeline_model_parallel_size wgrad_deferral_limit
window_attn_skip_freq window_size
""".split()
TABLES = ("HONOURED", "REFUSED", "REFUSED_PARTS", "REFUSED_WITH_CODES")


def test_every_field_of_megatrons_is_classified() -> None:
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    classified = {n for table in TABLES for n in getattr(megatron_settings, table)} | set(OTHERS)
    assert fields - classified == set()
    assert classified - fields == set(), "no longer a field"
    assert [name for name in OTHERS if not megatron_settings.is_classified(name)] == []


def config_of(**changes: object) -> TransformerConfig:
    """A legal configuration, then changed without Megatron's own checks."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        num_moe_experts=4,
        moe_ffn_hidden_size=16,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
    )
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def other_than(legal: tuple) -> object:
    """A value that a setting with these legal values must refuse."""
    return {int: 2, bool: True, str: "flex", type(None): 3}[type(legal[-1])]


@pytest.mark.parametrize("name", megatron_settings.REFUSED)
def test_what_the_layer_does_not_do_is_refused(name: str) -> None:
    refusal = megatron_settings.REFUSED[name]
    value = other_than(refusal.legal)
    with pytest.raises(ValueError, match=f"does not do {name}={value}") as refused:
        megatron_settings.check_layer_settings(config_of(**{name: value}), VQConfig())
    assert refusal.reason in str(refused.value)
    for legal in refusal.legal:
        megatron_settings.check_layer_settings(config_of(**{name: legal}), VQConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recompute_modules": ["core_attn", "moe_act"]}, "recompute_modules=moe_act"),
        ({"recompute_modules": ["shared_experts"]}, "recompute_modules=shared_experts"),
        ({"offload_modules": ["expert_fc1", "attn_norm"]}, "offload_modules=expert_fc1"),
        ({"cuda_graph_impl": "local", "cuda_graph_scope": ["moe_router"]}, "captured"),
        ({"cuda_graph_impl": "local", "cuda_graph_scope": "full"}, "captured"),
        ({"cuda_graph_impl": "local", "cuda_graph_scope": ["attn", "mlp"]}, "captured"),
        (
            {
                "moe_z_loss_coeff": 1e-3,
                "calculate_per_token_loss": True,
                "tensor_model_parallel_size": 2,
            },
            "weighs the z-loss 1 /",
        ),
        (
            {
                "moe_z_loss_coeff": 1e-3,
                "calculate_per_token_loss": True,
                "context_parallel_size": 2,
            },
            "weighs the z-loss 1 /",
        ),
    ],
)
def test_what_it_cannot_do_in_parts_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        megatron_settings.check_layer_settings(config_of(**changes), VQConfig())


def test_graphs_of_attention_and_recompute_of_the_whole_are_fine() -> None:
    for changes in (
        {"cuda_graph_impl": "local", "cuda_graph_scope": ["attn"]},
        {"recompute_modules": ["core_attn", "moe", "layernorm", "mlp"]},
        {"offload_modules": ["attn_norm"]},
    ):
        megatron_settings.check_layer_settings(config_of(**changes), VQConfig())


@pytest.mark.parametrize("name", megatron_settings.REFUSED_WITH_CODES)
def test_codes_have_neither_capacity_nor_forced_balance(name: str) -> None:
    config = config_of(**{name: 1.5})
    with pytest.raises(ValueError, match=f"vq.path=dual does not do {name}"):
        megatron_settings.check_layer_settings(config, VQConfig())
    megatron_settings.check_layer_settings(config, VQConfig(path="continuous"))


@pytest.mark.parametrize("name", megatron_settings.REFUSED_BY_ROUTER)
def test_a_bare_router_refuses_what_learned_routers_have(name: str) -> None:
    with pytest.raises(ValueError, match=f"VQRouter does not do {name}"):
        megatron_settings.check_router_settings(config_of(**{name: 2}))


def test_fp16_is_refused_by_whatever_holds_a_codebook() -> None:
    for changes in ({"fp16": True}, {"params_dtype": torch.float16}):
        config = config_of(**changes)
        with pytest.raises(ValueError, match="VQMoELayer does not do .*loss scale.*use bf16"):
            megatron_settings.check_layer_settings(config, VQConfig())
        with pytest.raises(ValueError, match="VQRouter does not do .*loss scale.*use bf16"):
            megatron_settings.check_router_settings(config)
        megatron_settings.check_expert_settings(config)  # experts alone know no step


def test_fp8_without_transformer_engine_is_refused_with_the_reason() -> None:
    config = config_of(fp8="hybrid")
    with pytest.raises(ValueError, match="fp8=hybrid: transformer_engine is not installed"):
        megatron_settings.check_layer_settings(config, VQConfig(execution="tokens"))
    with pytest.raises(ValueError, match="GroupedExperts does not do fp8=hybrid.*get_vqmoe_block"):
        megatron_settings.check_expert_settings(config)


def test_a_bare_router_has_no_balance_loss() -> None:
    for coefficients in (0.01, [0.0, 0.01]):
        config = config_of(
            moe_aux_loss_coeff=coefficients, moe_router_load_balancing_type="aux_loss"
        )
        with pytest.raises(ValueError, match="no balance loss"):
            megatron_settings.check_router_settings(config)
    megatron_settings.check_router_settings(config_of())


def test_a_field_of_a_newer_megatron_must_keep_its_default() -> None:
    newer = dataclasses.make_dataclass(
        "Newer", [("moe_new_trick", int, 3), ("new_attention", int, 3)], bases=(TransformerConfig,)
    )
    known, patch = TransformerConfig, pytest.MonkeyPatch()
    config = newer(
        **{f.name: getattr(config_of(), f.name) for f in dataclasses.fields(known) if f.init}
    )
    with patch.context() as patched:
        patched.setattr(megatron_settings, "TransformerConfig", newer)
        config.new_attention = 4
        megatron_settings.check_layer_settings(config, VQConfig())
        config.moe_new_trick = 4
        with pytest.raises(ValueError, match="does not know Megatron's moe_new_trick=4"):
            megatron_settings.check_layer_settings(config, VQConfig())


@pytest.mark.parametrize(
    ("freq", "layers"), [(1, [1, 1, 1, 1]), (2, [1, 0, 1, 0]), ([0, 1, 1, 0], [0, 1, 1, 0])]
)
def test_moe_layer_freq_as_megatron_reads_it(freq: object, layers: list) -> None:
    config = config_of(moe_layer_freq=freq, num_layers=4)
    assert [megatron_settings.is_moe_layer(config, i) for i in range(4)] == [
        bool(n) for n in layers
    ]


def built(module: str, settings: dict, vq: dict) -> str:
    """In a rank: what the constructor says."""
    from tiny_layer import build_layer, transformer_config

    from vqmoe_megatron.moe import VQRouter

    try:
        if module == "layer":
            build_layer(VQConfig(**vq), **settings)
        else:
            VQRouter(transformer_config(**settings))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("module", "settings", "vq", "message"),
    [
        ("layer", {"moe_permute_fusion": False, "moe_router_dtype": "fp32"}, {}, ""),
        ("layer", {"moe_expert_capacity_factor": 1.0}, {}, "codes have no capacity"),
        ("layer", {"moe_expert_capacity_factor": 1.0}, {"path": "continuous"}, ""),
        ("layer", {"moe_router_force_load_balancing": True}, {}, "not drawn at random"),
        ("layer", {"hidden_size": 18, "num_attention_heads": 2}, {}, "hidden_size % 4 != 0"),
        ("layer", {"moe_ffn_hidden_size": 18}, {}, r"moe_ffn_hidden_size % (ETP * 4 = 1 * 4) != 0"),
        (
            "layer",
            {"hidden_size": 20, "bf16": True, "params_dtype": torch.bfloat16},
            {},
            "hidden_size % 8 != 0: 20 % 8 = 4",
        ),
        ("router", {"moe_expert_capacity_factor": 1.0}, {}, "codes have no capacity"),
        ("router", {"moe_router_force_load_balancing": True}, {}, "not drawn at random"),
    ],
)
def test_the_constructors_ask(ranks, module, settings, vq, message) -> None:
    settings = {name: str(v) if isinstance(v, torch.dtype) else v for name, v in settings.items()}
    (text,) = ranks(1).run(built_of_names, module, settings, vq)
    assert message in text if message else text == ""


def built_of_names(module: str, settings: dict, vq: dict) -> str:
    """In a rank: :func:`built`; dtypes travel as names."""
    settings = {
        name: getattr(torch, v.removeprefix("torch.")) if str(v).startswith("torch.") else v
        for name, v in settings.items()
    }
    return built(module, settings, vq)


def gated_outputs(settings: dict) -> list[torch.Tensor]:
    """In a rank: the same gated experts as GroupedExperts and as Megatron's SequentialMLP."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.spec_utils import build_module
    from tiny_layer import HIDDEN, NUM_EXPERTS, transformer_config

    from vqmoe_megatron.moe import GroupedExperts

    config = transformer_config(
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        **settings,
    )
    groups = get_default_pg_collection()
    grouped = GroupedExperts(NUM_EXPERTS, config, pg_collection=groups).double()
    spec = get_moe_module_spec(
        use_te=False, num_experts=NUM_EXPERTS, moe_grouped_gemm=False
    ).submodules.experts
    theirs = build_module(spec, NUM_EXPERTS, config, pg_collection=groups).double()
    with torch.no_grad():
        for parameter in (grouped.weight1, grouped.weight2):
            parameter.normal_(std=0.6)
        for number, expert in enumerate(theirs.local_experts):
            expert.linear_fc1.weight.copy_(grouped.weight1[number])
            expert.linear_fc2.weight.copy_(grouped.weight2[number])
    x = torch.randn(12, HIDDEN, dtype=torch.float64) * 3
    counts = torch.tensor([3, 0, 4, 5])
    found = []
    for experts in (grouped, theirs):
        rows = x.clone().requires_grad_()
        output, _ = experts(rows, counts, torch.ones(12, dtype=torch.float64))
        (grad,) = torch.autograd.grad(output.square().sum(), rows)
        found += [output.detach(), grad]
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"glu_linear_offset": 1.0},
        {"activation_func_clamp_value": 0.7},
        {"glu_linear_offset": 0.5, "activation_func_clamp_value": 1.1},
    ],
)
def test_gated_experts_offset_and_clamp_as_megatrons(ranks, settings) -> None:
    ((ours, our_grad, theirs, their_grad),) = ranks(1).run(gated_outputs, settings)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-12, atol=1e-12)
    if settings:
        ((plain, *_),) = ranks(1).run(gated_outputs, {})
        assert not torch.allclose(ours, plain)  # the setting does something


def test_a_shared_expert_has_no_biases() -> None:
    config = config_of(moe_shared_expert_intermediate_size=8)
    with pytest.raises(ValueError, match="needs add_bias_linear=False"):
        megatron_settings.check_layer_settings(config, VQConfig())
    config.add_bias_linear = False
    megatron_settings.check_layer_settings(config, VQConfig())


@pytest.mark.parametrize("name", megatron_settings.REFUSED_WITH_ONE_EXPERT)
def test_one_expert_refuses_what_routers_and_capacities_would_do(name: str) -> None:
    config = config_of(num_moe_experts=1, **{name: 2})
    with pytest.raises(ValueError, match=f"VQMoELayer with num_moe_experts=1 does not do {name}=2"):
        megatron_settings.check_layer_settings(config, VQConfig(path="continuous"))
    config.num_moe_experts = 4
    megatron_settings.check_layer_settings(config, VQConfig(path="continuous"))
