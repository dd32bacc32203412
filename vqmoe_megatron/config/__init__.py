"""The configuration of a run: sections, ranges, rules, and the recipe that holds them."""

from vqmoe_megatron.config.code_memory import CodeMemoryConfig
from vqmoe_megatron.config.finetune import FinetuneConfig
from vqmoe_megatron.config.router import RouterConfig
from vqmoe_megatron.config.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerSection,
    ParallelConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
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
