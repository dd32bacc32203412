"""Which attention, positions and memory of earlier text go together."""

from __future__ import annotations

from vqmoe_megatron.config.checks import check_choice

ATTENTIONS = ("standard", "transformer_xl")


def check_attention(
    attention: str, position_embedding_type: str, memory_length_tokens: int
) -> None:
    """Raise ``ValueError`` for an unknown attention, or settings that the chosen one does not have.

    Only Transformer-XL's attention has relative positions and a memory, and it has no other ones.
    """
    check_choice("model", "attention", attention, ATTENTIONS)
    has_relative = position_embedding_type == "relative"
    if attention == "transformer_xl" and not has_relative:
        raise ValueError(
            f"model.attention=transformer_xl with model.position_embedding_type="
            f"{position_embedding_type}: its scores go by relative positions; set "
            "model.position_embedding_type=relative"
        )
    if attention != "transformer_xl" and has_relative:
        raise ValueError(
            f"model.position_embedding_type=relative with model.attention={attention}: relative "
            "positions are part of Transformer-XL's scores; set model.attention=transformer_xl, or "
            "use rope or learned_absolute"
        )
    if attention != "transformer_xl" and memory_length_tokens:
        raise ValueError(
            f"model.memory_length_tokens={memory_length_tokens} with model.attention={attention}: "
            "only model.attention=transformer_xl remembers the text before; set it, or leave the "
            "memory out"
        )
