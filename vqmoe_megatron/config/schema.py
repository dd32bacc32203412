"""The typed run configuration: one small dataclass per recipe section.

Field names are Megatron's wherever Megatron has one; units are in the names. The legal range of a
number is a row of :mod:`vqmoe_megatron.config.ranges`; every other rule that one section can check
by itself is checked in its ``__post_init__`` with a ``ValueError`` that names the rule. Rules
between sections and the number of ranks live in :mod:`vqmoe_megatron.plan.layout`.
Reading and overriding a recipe file lives in :mod:`vqmoe_megatron.config.recipe`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from vqmoe_megatron import registry
from vqmoe_megatron.config.attention import check_attention
from vqmoe_megatron.config.checks import check_choice, check_settings
from vqmoe_megatron.config.code_memory import CodeMemoryConfig
from vqmoe_megatron.config.finetune import FinetuneConfig
from vqmoe_megatron.config.router import RouterConfig
from vqmoe_megatron.config.router_rules import check_router, router_in_words
from vqmoe_megatron.config.vision import VisionConfig
from vqmoe_megatron.config.vq import VQConfig

__all__ = [
    "CheckpointConfig",
    "CodeMemoryConfig",
    "DataConfig",
    "FinetuneConfig",
    "ModelConfig",
    "OptimizerSection",
    "ParallelConfig",
    "RouterConfig",
    "RunConfig",
    "TrackingConfig",
    "TrainConfig",
    "VQConfig",
    "VisionConfig",
]


@dataclass
class ModelConfig:
    """The transformer: TransformerConfig's field names, plus ``vocab_size`` and ``seq_length``."""

    num_layers: int = 4
    hidden_size: int = 256
    num_attention_heads: int = 8
    num_query_groups: int | None = None
    kv_channels: int | None = None
    ffn_hidden_size: int | None = None  # dense layers only (moe_layer_freq > 1)
    moe_ffn_hidden_size: int = 512
    num_moe_experts: int = 16
    moe_shared_expert_intermediate_size: int | None = None  # width; None: no shared expert
    moe_layer_freq: int = 1
    moe_router: str = "topk"  # of the continuous path
    moe_router_freeze: bool = False  # its weights stay as drawn
    moe_router_topk: int = 1
    moe_router_pre_softmax: bool = True
    moe_router_load_balancing_type: str = "aux_loss"
    moe_aux_loss_coeff: float = 0.01
    moe_z_loss_coeff: float | None = None
    moe_router_dtype: str | None = "fp32"
    calculate_per_token_loss: bool = False  # mean over the batch's tokens, not over microbatches
    activation_func: str = "gelu"  # gelu | relu | silu
    gated_linear_unit: bool = False
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    normalization: str = "LayerNorm"  # LayerNorm | RMSNorm
    layernorm_epsilon: float = 1e-5
    norm_placement: str = "pre"  # pre | post: behind each residual sum, and no final norm
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_method_std: float = 0.02
    embedding_init_method_std: float | None = None  # None: init_method_std
    bf16: bool = False
    fp8: str | None = None  # hybrid | e4m3: Transformer Engine's linear layers, experts included
    fp8_recipe: str = "tensorwise"  # tensorwise | blockwise | mxfp8: those that keep no history
    transformer_impl: str = "auto"  # auto | local | transformer_engine; auto: TE where it imports
    # Of the three switches null means: where the kernel can be imported on CUDA, else not.
    fused_layer_norm: bool | None = None  # Apex's in local layers; TE's layers bring their own
    gradient_accumulation_fusion: bool | None = None  # Apex's, in linear layers; never the experts
    position_embedding_type: str = "rope"  # rope | learned_absolute | relative
    rotary_base: int = 10000
    attention: str = "standard"  # standard | transformer_xl: by relative positions, over streams
    memory_length_tokens: int = 0  # of transformer_xl: hidden states before a segment; 0: none
    untie_embeddings_and_output_weights: bool = True
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    recompute_modules: list[str] | None = None
    seq_length: int = 256
    vocab_size: int | None = None  # None: the corpus tokenizer's
    make_vocab_size_divisible_by: int = 128

    def __post_init__(self) -> None:
        check_settings("model", self)
        registry.check_name("router", self.moe_router)
        check_router(self)
        check_choice("model", "activation_func", self.activation_func, ("gelu", "relu", "silu"))
        check_choice("model", "normalization", self.normalization, ("LayerNorm", "RMSNorm"))
        check_choice("model", "norm_placement", self.norm_placement, ("pre", "post"))
        check_choice(
            "model",
            "position_embedding_type",
            self.position_embedding_type,
            ("rope", "learned_absolute", "relative"),
        )
        check_attention(self.attention, self.position_embedding_type, self.memory_length_tokens)
        check_choice(
            "model",
            "moe_router_load_balancing_type",
            self.moe_router_load_balancing_type,
            ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
        )
        if self.moe_router_dtype is not None:
            check_choice("model", "moe_router_dtype", self.moe_router_dtype, ("fp32", "fp64"))
        check_choice(
            "model",
            "transformer_impl",
            self.transformer_impl,
            ("auto", "local", "transformer_engine"),
        )
        if self.fp8 is not None:
            check_choice("model", "fp8", self.fp8, ("hybrid", "e4m3"))
        check_choice("model", "fp8_recipe", self.fp8_recipe, ("tensorwise", "blockwise", "mxfp8"))
        if self.recompute_granularity is not None:
            check_choice(
                "model", "recompute_granularity", self.recompute_granularity, ("full", "selective")
            )
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size % num_attention_heads != 0: {self.hidden_size} % "
                f"{self.num_attention_heads} = "
                f"{self.hidden_size % self.num_attention_heads}; change one, or set "
                "model.kv_channels"
            )
        head_size = self.kv_channels or self.hidden_size // self.num_attention_heads
        if self.position_embedding_type == "rope" and head_size % 2:
            raise ValueError(
                f"model.position_embedding_type=rope turns the numbers of a head in pairs, but "
                f"kv_channels (default: hidden_size / num_attention_heads) % 2 != 0: {head_size} % "
                "2 = 1; change it, or use learned_absolute"
            )
        if self.moe_router_topk > self.num_moe_experts:
            raise ValueError(
                f"model.moe_router_topk={self.moe_router_topk} exceeds "
                f"model.num_moe_experts={self.num_moe_experts}"
            )
        if self.moe_shared_expert_intermediate_size is not None and self.add_bias_linear:
            raise ValueError(
                "model.moe_shared_expert_intermediate_size="
                f"{self.moe_shared_expert_intermediate_size} needs model.add_bias_linear=false: "
                "Megatron's SharedExpertMLP has no biases; set it, or leave the shared expert out"
            )
        is_weighed_alone = self.moe_router_topk == 1 and not self.moe_router_pre_softmax
        if is_weighed_alone and not self.moe_router_freeze:
            raise ValueError(
                "model.moe_router_topk=1 needs model.moe_router_pre_softmax=true: a softmax over "
                "one selected logit is always 1, so the router would get no gradient from the "
                "task; set it, or say that the router is frozen: model.moe_router_freeze=true"
            )


@dataclass
class ParallelConfig:
    """The layout, in Megatron's names. ``sequence_parallel`` unset means: on when TP > 1."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    sequence_parallel: bool | None = None

    def __post_init__(self) -> None:
        check_settings("parallel", self)


@dataclass
class DataConfig:
    """Which prepared corpus to read and how to evaluate on it."""

    path: str = "data/stdlib"
    eval_split: str = "valid"
    eval_window_tokens: int | None = None  # None: seq_length; shorter ones are padded
    eval_stride_tokens: int | None = None  # None: the window, windows do not overlap
    num_workers: int = 0
    cache_dir: str | None = None  # of sample orders; None: the corpus', or else the run directory's

    def __post_init__(self) -> None:
        check_settings("data", self)
        check_choice("data", "eval_split", self.eval_split, ("valid", "test"))


@dataclass
class OptimizerSection:
    """Megatron's optimizer and learning-rate schedule."""

    optimizer: str = "adam"
    lr: float = 1e-3
    min_lr: float = 1e-4
    lr_decay_style: str = "cosine"
    lr_warmup_iters: int = 0
    lr_decay_iters: int | None = None  # None: train.train_iters
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    fused_adam: bool | None = None  # null: Transformer Engine's or Apex's where it imports on CUDA
    clip_grad: float = 1.0
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    def __post_init__(self) -> None:
        check_settings("optimizer", self)
        check_choice("optimizer", "optimizer", self.optimizer, ("adam",))
        registry.check_name("schedule", self.lr_decay_style)
        if self.min_lr > self.lr:
            raise ValueError(
                f"optimizer.min_lr={self.min_lr} must not exceed optimizer.lr={self.lr}"
            )
        if self.overlap_param_gather and not (
            self.use_distributed_optimizer and self.overlap_grad_reduce
        ):
            raise ValueError(
                "optimizer.overlap_param_gather needs optimizer.use_distributed_optimizer and "
                "optimizer.overlap_grad_reduce"
            )


@dataclass
class TrainConfig:
    """The loop: how long, how large a batch, when to look and when to stop."""

    output_dir: str = "runs/run"
    train_iters: int = 200
    global_batch_size: int = 32
    micro_batch_size: int = 4
    seed: int = 1234
    device: str = "auto"
    log_interval: int = 10
    eval_interval: int = 0  # 0: only before and after training
    eval_iters: int = 10  # global batches of evaluation windows; 0: no evaluation
    exit_interval: int | None = None
    exit_duration_in_mins: float | None = None
    nan_policy: str = "stop"  # stop | skip the update | rollback to the last checkpoint
    deterministic: bool = False  # bitwise equal reruns
    cuda_graphs: bool = False  # capture the discrete path in code space, forwards and backwards
    check_replicas_interval: int = 0  # 0: never compare what replicas hold
    layout_independent_init: bool = True
    task: str = "pretrain"
    engine: str = "megatron"
    zero_stage: int = 0  # of train.engine=deepspeed: 0 | 1 | 2
    offload_optimizer: bool = False  # of train.engine=deepspeed: its state lies in host memory

    def __post_init__(self) -> None:
        check_settings("train", self)
        check_choice("train", "device", self.device, ("auto", "cpu", "cuda"))
        check_choice("train", "nan_policy", self.nan_policy, ("stop", "skip", "rollback"))
        registry.check_name("task", self.task)
        registry.check_name("engine", self.engine)


@dataclass
class CheckpointConfig:
    """When to save, what to load, how many to keep."""

    save_interval: int = 0  # 0: only at the end and on a stop request
    load: str | None = None  # a run directory or a checkpoint folder
    keep_last: int = 2
    async_save: bool = False  # write in the background while training goes on
    remap: bool = False  # start from checkpoint.load with another number of codes or experts

    def __post_init__(self) -> None:
        check_settings("checkpoint", self)


@dataclass
class TrackingConfig:
    """MLflow and others. ``mlflow_uri`` unset means a SQLite file beside the run directories."""

    mlflow: bool = True
    also: list[str] = field(default_factory=list)  # further trackers: names of the registry
    mlflow_uri: str | None = None
    experiment: str = "vqmoe"
    run_name: str | None = None
    parent_run_id: str | None = None  # the MLflow run this one is shown under: a study's
    tags: list[str] = field(default_factory=list)  # further tags of the MLflow run: NAME=VALUE
    system_metrics: bool = True  # CPU, memory and GPU of rank 0's node, sampled by a thread

    def __post_init__(self) -> None:
        check_settings("tracking", self)
        for name in self.also:
            registry.check_name("tracker", name)
        if len({"mlflow", *self.also}) <= len(self.also):
            raise ValueError(
                f"tracking.also={','.join(self.also)}: name every tracker once, and MLflow by its "
                "own switch, tracking.mlflow"
            )
        for tag in self.tags:
            if not tag.partition("=")[0] or "=" not in tag:
                raise ValueError(f"tracking.tags: write NAME=VALUE, not {tag!r}")
        if self.mlflow_uri is not None and _may_hold_password(self.mlflow_uri):
            raise ValueError(  # without the value: it would end in logs
                "tracking.mlflow_uri must not hold a user name or password (user:password@host), "
                "because the run writes it to its logs, run_config.yaml and MLflow; "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        if self.mlflow_uri is not None and _has_cut_path(self.mlflow_uri):
            raise ValueError(
                f"tracking.mlflow_uri={self.mlflow_uri}: a SQLite URI ends its path at the first "
                "?, and options such as timeout=30 follow; write a ? of the path as %3F and a % as "
                "%25"
            )
        if self.parent_run_id == "":
            raise ValueError(
                "tracking.parent_run_id is empty; give an MLflow run id, or null for a run of its "
                "own"
            )

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names of all trackers of the run."""
        return (*(("mlflow",) if self.mlflow else ()), *self.also)


def _may_hold_password(uri: str) -> bool:
    """Tell whether ``uri`` has an ``@`` that is not part of a local file's path."""
    try:
        parts = urlsplit(uri)
    except ValueError:  # no legal URI, and Python's own message would repeat it
        return "@" in uri
    # Beyond the host part too: a password with / or # ends it early, and without // it is empty.
    return "@" in parts.netloc or ("@" in uri and parts.scheme not in ("", "file", "sqlite"))


def _has_cut_path(uri: str) -> bool:
    """Tell whether ``uri`` is of a SQLite file whose path has a ``?``: it would be cut there."""
    head, _, options = uri.partition("?")
    is_file = head.startswith("sqlite:") and head != uri
    return is_file and not all(re.fullmatch(r"\w+=[^/]*", text) for text in options.split("&"))


@dataclass
class RunConfig:
    """A whole recipe: the resolved content of ``run_config.yaml``."""

    model: ModelConfig = field(default_factory=ModelConfig)
    vq: VQConfig = field(default_factory=VQConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    code_memory: CodeMemoryConfig = field(default_factory=CodeMemoryConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def experts_in_words(self) -> str:
        """What stands in the place of the MLP; one line for the user."""
        model, vq = self.model, self.vq
        said = f"{model.num_moe_experts} of width {model.moe_ffn_hidden_size}"
        if vq.has_router(model.num_moe_experts):
            said += f", {router_in_words(self)}"
            said += " of a frozen router" if model.moe_router_freeze else ""
        else:
            said += " for every token: dense" if vq.path == "continuous" else ""
            said += ", no router"
            if model.moe_router != "topk":
                said += f": model.moe_router={model.moe_router} has no effect"
        if model.moe_shared_expert_intermediate_size is not None:
            said += f", and a shared one of width {model.moe_shared_expert_intermediate_size}"
        return f"{said}, every {model.moe_layer_freq} layer(s)"
