"""Megatron-core as the engine: model, optimizer, one training step."""
