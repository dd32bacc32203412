"""The ``README.md`` of an exported model."""

from __future__ import annotations

from typing import Any

from vqmoe_megatron import __version__
from vqmoe_megatron.config import RunConfig

PAPER = "https://arxiv.org/abs/2411.19402"


def model_card(config: RunConfig, facts: dict[str, Any]) -> str:
    """Return the page.

    Args:
        config: the checkpoint's recipe.
        facts: ``iteration``, ``consumed_samples``, ``corpus``, ``tokenizer`` (its kind),
            ``num_parameters`` and ``has_tokenizer`` of what was written.
    """
    model, vq, memory = config.model, config.vq, config.code_memory
    num_tokens = facts["consumed_samples"] * model.seq_length
    path = {
        "continuous": f"Megatron's top-{model.moe_router_topk} router",
        "discrete": f"the nearest of {vq.num_codes} codes, whose experts' outputs are a table",
        "dual": f"Megatron's top-{model.moe_router_topk} router beside a table of "
        f"{vq.num_codes} codes, weighed by a gate",
        "filled": f"those that a router sends the token to, beside a table of every expert's "
        f"answers to {vq.num_codes} codes",
    }[vq.path]
    how = (
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)\n"
        'inputs = tokenizer("import os\\n", return_tensors="pt")'
        if facts["has_tokenizer"]
        else 'inputs = {"input_ids": ...}  # the corpus\' own tokenizer was not at hand'
    )
    imported = ", AutoTokenizer" if facts["has_tokenizer"] else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, vector-quantization, vqmoe]
---

# VQMoE, {model.num_layers} layers, {model.num_moe_experts} experts

A sparse mixture-of-experts language model, exported by vqmoe_megatron {__version__} from iteration
{facts["iteration"]:,} of a run. Method: [On the Role of Discrete Representation in Sparse Mixture
of Experts]({PAPER}).

| what | how |
|---|---|
| values here | {facts["num_parameters"]:,}, tables and rows counted |
| width, heads | {model.hidden_size}, {model.num_attention_heads} |
| experts | {model.num_moe_experts} of width {model.moe_ffn_hidden_size} |
| which experts | {path} |
| code memory | {memory.in_words} |
| vocabulary | {model.vocab_size:,}, tokenizer {facts["tokenizer"]} |
| trained on | {facts["corpus"]}, {num_tokens:,} tokens in samples of {model.seq_length} |
| dtype of training | {"bfloat16" if model.bf16 else "float32"} |

```python
from transformers import AutoModelForCausalLM{imported}

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
{how}
print(model.generate(**inputs, max_new_tokens=50))
```

`modeling_vqmoe.py` needs torch and transformers 5 alone. Codes, tables and rows have no gradient
here: for training, `vqmoe import FOLDER --out RUN_DIR` makes a run of it. Sequences longer than
{model.seq_length} tokens were not trained on.
"""
