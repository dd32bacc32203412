"""Which models have a Hugging Face form, judged by their recipe alone."""

from __future__ import annotations

from vqmoe_megatron.config import RunConfig

OUR_QUANTIZERS = ("euclidean", "product", "residual", "low_dim", "cosine", "fsq", "lfq")


def check_has_hf_form(config: RunConfig) -> None:
    """Raise ``ValueError`` for what the modelling file does not compute."""
    vq, model = config.vq, config.model
    if config.vision.is_on:
        raise ValueError(
            f"vision.image_size={config.vision.image_size} has no Hugging Face form: the modelling "
            "file reads text; vqmoe export --tables writes the tables of its layers"
        )
    if config.finetune.is_on:
        raise ValueError(
            "a fine-tuned checkpoint has no Hugging Face form: the modelling file writes text, and "
            "this model has a classification head instead; export the pretrained one"
        )
    if vq.path != "continuous":
        if vq.expert_input != "code":
            raise ValueError(
                f"vq.expert_input={vq.expert_input} has no Hugging Face form: every token has an "
                "expert input of its own, so no table holds the discrete path; expert_input=code "
                "has one"
            )
        if vq.quantizer not in OUR_QUANTIZERS:
            raise ValueError(
                f"vq.quantizer={vq.quantizer} has no Hugging Face form: the modelling file "
                f"searches as {', '.join(OUR_QUANTIZERS)} do"
            )
    if model.norm_placement != "pre":
        raise ValueError(
            f"model.norm_placement={model.norm_placement} has no Hugging Face form: the modelling "
            "file has its norms in front of attention and experts (norm_placement=pre)"
        )
    if model.attention != "standard":
        raise ValueError(
            f"model.attention={model.attention} has no Hugging Face form: the modelling file has "
            "Megatron's standard attention, with rope or learned positions and no memory"
        )
    if model.moe_router != "topk":
        raise ValueError(
            f"model.moe_router={model.moe_router} has no Hugging Face form: the modelling file has "
            "Megatron's top-k router (moe_router=topk)"
        )
