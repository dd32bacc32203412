"""Fine-tuning: what a pretrained model becomes to classify texts, and what is refused.

1. :class:`FinetuneConfig` is the recipe's section ``finetune``; ``train.task=finetune`` reads it.
2. :func:`tuned_recipe` turns the recipe of a checkpoint into that of a fine-tuning run.
3. :func:`finetune_errors` says what such a recipe must not ask for. Texts are filled up on the
   right, and the layer does not know which tokens are filling, so nothing that trains may count
   tokens: codebooks are frozen, balance and codebook losses are off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vqmoe_megatron import registry
from vqmoe_megatron.config.checks import check_choice, check_settings

if TYPE_CHECKING:
    from vqmoe_megatron.config.router import RouterConfig
    from vqmoe_megatron.config.schema import ModelConfig, RunConfig
    from vqmoe_megatron.config.vq import VQConfig

TASK = "finetune"  # train.task of a fine-tuning run
DATASETS = ("sst2", "sst5", "imdb", "banking77")
MODES = ("full", "continuous", "discrete", "head")
PADDING = "texts are filled up with tokens that this would count"
# What of a router counts tokens, and the value at which it does not.
COUNTING_ROUTER_SETTINGS = {
    "capacity_factor": None,
    "bias_update_rate": 0.0,
    "distill_coeff": 0.0,
}


@dataclass(frozen=True)
class FinetuneConfig:
    """Which texts a classification head is trained on, and what of the model trains with it."""

    dataset: str | None = None  # sst2 | sst5 | imdb | banking77; null: no fine-tuning
    path: str | None = None  # folder with the texts
    mode: str = "full"  # full | continuous | discrete | head
    num_classes: int | None = None  # null: that of the texts
    sha256: str | None = None  # of the texts' files: a run goes on with the same only
    classes: list[str] | None = None  # their names, where the texts' train split gives them

    def __post_init__(self) -> None:
        check_settings("finetune", self)
        check_choice("finetune", "mode", self.mode, MODES)
        if self.dataset is not None:
            check_choice("finetune", "dataset", self.dataset, DATASETS)

    @property
    def is_on(self) -> bool:
        """Whether the model has a classification head in the place of its output layer."""
        return self.dataset is not None


def path_of_mode(stored_path: str, mode: str) -> str:
    """``vq.path`` of a fine-tuning run that starts from a checkpoint of ``stored_path``.

    Raises:
        ValueError: for a mode whose path the checkpoint's layer does not have.
    """
    if mode in ("full", "head") or stored_path == mode:
        return stored_path
    if stored_path == "dual":
        return mode
    has = {"continuous": "no discrete path", "discrete": "no router"}.get(
        stored_path, "one path in which router and codes answer together"
    )
    legal = [m for m in MODES if m in ("full", "head", stored_path)]
    raise ValueError(
        f"mode {mode} cannot start from this checkpoint: its layers have vq.path={stored_path}, "
        f"{has}; choose {' or '.join(legal)}, or pretrain with vq.path=dual"
    )


def tuned_vq(vq: VQConfig, mode: str) -> VQConfig:
    """The layer's settings: the mode's path, codes frozen, no loss that counts tokens."""
    path = path_of_mode(vq.path, mode)
    still: dict[str, Any] = {
        "path": path,
        "freeze_codebook": True,
        "freeze_after_steps": None,
        "revival": "random",
        "vq_loss_coeff": 0.0,
    }
    if vq.quantizer == "lfq":
        still["entropy_loss_coeff"] = 0.0
    if path == "continuous":  # what only a discrete path has
        still |= {
            "execution": "auto",
            "code_input": "codebook",
            "table_per_step": False,
            "overlap_table": False,
            "learn_code_scale": False,
            "train_projection": False,
        }
    return replace(vq, **still)


def tuned_model(model: ModelConfig, seq_length: int) -> ModelConfig:
    """The transformer: without balance losses; the output layer is no copy of the embedding."""
    return replace(
        model,
        seq_length=seq_length,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_z_loss_coeff=None,
        untie_embeddings_and_output_weights=True,
    )


def counting_router_settings(model: ModelConfig, router: RouterConfig) -> dict[str, Any]:
    """Settings of this router that count tokens, each with the value at which it does not."""
    if not registry.is_ours("router", model.moe_router) or router.variant == "released":
        return {}
    takes = registry.takes("router", model.moe_router)
    return {name: still for name, still in COUNTING_ROUTER_SETTINGS.items() if name in takes}


def tuned_router(stored: RunConfig) -> RouterConfig:
    """The router's settings: schedules as the pretrained run had them, whose steps go on to be
    counted; nothing that counts tokens."""
    model, router = stored.model, stored.router
    if router.variant != "released":  # which has no schedule
        iters = stored.train.train_iters
        router = router.for_run(model.moe_router, model.num_moe_experts, iters)
    return replace(router, **counting_router_settings(model, router))


def tuned_recipe(
    stored: RunConfig, load: str, finetune: FinetuneConfig, seq_length: int
) -> RunConfig:
    """The recipe of a fine-tuning run from a checkpoint's; one rank, a modest learning rate.

    Raises:
        ValueError: as :func:`path_of_mode`.
    """
    return replace(
        stored,
        model=tuned_model(stored.model, seq_length),
        vq=tuned_vq(stored.vq, finetune.mode),
        router=tuned_router(stored),
        finetune=finetune,
        parallel=type(stored.parallel)(),
        data=replace(
            stored.data,
            eval_split="valid",
            eval_window_tokens=None,
            eval_stride_tokens=None,
            cache_dir=None,
        ),
        optimizer=replace(
            stored.optimizer,
            lr=1e-3,
            min_lr=0.0,
            lr_decay_style="linear",
            lr_warmup_iters=0,
            lr_decay_iters=None,
            weight_decay=0.01,
        ),
        train=replace(
            stored.train,
            task=TASK,
            engine="megatron",
            zero_stage=0,
            offload_optimizer=False,
            global_batch_size=32,
            micro_batch_size=8,
            eval_iters=1,
            exit_interval=None,
            exit_duration_in_mins=None,
            layout_independent_init=True,
        ),
        checkpoint=replace(stored.checkpoint, load=load, remap=False, keep_last=1),
        tracking=replace(stored.tracking, run_name=None, parent_run_id=None, tags=[]),
    )


def finetune_errors(config: RunConfig) -> Iterator[str]:
    """What is wrong with a recipe as one of fine-tuning, a sentence each."""
    tune, vq, memory = config.finetune, config.vq, config.code_memory
    if tune.is_on != (config.train.task == TASK):
        yield (
            f"train.task={config.train.task} with finetune.dataset={tune.dataset}: the task "
            f"{TASK} and a data set belong together; vqmoe finetune sets both"
        )
    if not tune.is_on:
        return
    if tune.path is None or tune.num_classes is None:
        yield "finetune.path and finetune.num_classes must be set; vqmoe finetune sets both"
    if config.checkpoint.load is None:
        yield "fine-tuning starts from a checkpoint; name it in checkpoint.load"
    if tune.mode in ("continuous", "discrete") and vq.path != tune.mode:
        yield f"finetune.mode={tune.mode} is vq.path={tune.mode}, not {vq.path}"
    if config.model.moe_aux_loss_coeff or config.model.moe_z_loss_coeff:
        yield f"fine-tuning needs moe_aux_loss_coeff=0 and moe_z_loss_coeff=null: {PADDING}"
    if vq.path != "continuous" and not (vq.freeze_codebook and vq.vq_loss_coeff == 0):
        yield f"fine-tuning needs vq.freeze_codebook=true and vq.vq_loss_coeff=0: {PADDING}"
    if vq.path != "continuous" and vq.quantizer == "lfq" and vq.entropy_loss_coeff:
        yield f"fine-tuning needs vq.entropy_loss_coeff=0: {PADDING}"
    for name, still in counting_router_settings(config.model, config.router).items():
        if config.vq.has_router(config.model.num_moe_experts) and (
            getattr(config.router, name) != still
        ):
            value = "null" if still is None else still
            yield f"fine-tuning needs router.{name}={value}: {PADDING}"
    if vq.threshold_routing:
        yield f"vq.threshold_routing cannot be fine-tuned: its threshold follows tokens, {PADDING}"
    if memory.is_on and (memory.codes in ("embedding", "hidden") or memory.num_context_codes):
        yield (
            f"code_memory.codes={memory.codes} with code_memory.num_context_codes="
            f"{memory.num_context_codes} cannot be fine-tuned: its codes follow tokens, {PADDING}; "
            "codes=tokens can"
        )
    if not config.model.untie_embeddings_and_output_weights:
        yield "fine-tuning needs model.untie_embeddings_and_output_weights=true: it has a head"
    if not config.train.layout_independent_init:
        yield "fine-tuning needs train.layout_independent_init=true: all ranks draw the same head"
    if config.train.engine != "megatron":
        yield f"train.engine={config.train.engine} cannot fine-tune; use train.engine=megatron"
    if tune.mode == "head" and config.parallel.pipeline_model_parallel_size > 1:
        yield (
            "finetune.mode=head with pipeline_model_parallel_size="
            f"{config.parallel.pipeline_model_parallel_size}: stages without the head would train "
            "nothing, and Megatron's optimizer needs a parameter on each; use 1"
        )
