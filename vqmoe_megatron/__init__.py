"""Train vector-quantised sparse mixture-of-experts language models on Megatron-core."""

__version__ = "0.5.0"
