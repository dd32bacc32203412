"""Kernels of one microbatch on one rank outside the MoE layer.

t tokens of a microbatch, T this rank's (t / TP with sequence parallelism), S sequence length, H
hidden size, A heads and G groups of d columns, D dense width, V padded vocabulary, e bytes per
element. Operations are those of ``flops.py``.

Element-wise work, in passes over its tensors: a norm reads and writes (1, 1) forward and (2, 1)
backward, a residual with its dropout (2, 1) and (2, 1), rope about (6, 5) each way, an activation
as in :func:`activation_kernels`. The loss is Megatron's unfused cross entropy in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.activation_memory import writes_scores
from vqmoe_megatron.plan.flops import Flops, module_flops
from vqmoe_megatron.plan.hardware import Hardware
from vqmoe_megatron.plan.kernels import (
    BACKWARD,
    FORWARD,
    FP32_BYTES,
    Kernel,
    ProductBytes,
    model_unit,
    moved,
    products,
)
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.logits import logits_shape
from vqmoe_megatron.plan.parameters import dense_ffn_size, head_sizes
from vqmoe_megatron.plan.shape import LayerShape
from vqmoe_megatron.plan.transformer_xl import RelativeShape, is_relative

CORE_ATTENTION = "core attention"  # name of the kernels that recompute_modules=core_attn repeats


def attention_kernels(
    config: RunConfig, layout: ParallelLayout, hardware: Hardware
) -> Iterator[Kernel]:
    """Projections and core attention of one layer. Local kernels write and read the scores [A, S,
    S]: about 6 passes forward (products, mask, softmax, dropout), 8 backward; others never, and
    that they make the scores anew in the backward pass is not counted."""
    model, shards = config.model, layout.tensor_model_parallel_size
    element, flops = 2 if model.bf16 else 4, module_flops(config, layout)
    unit, tokens = model_unit(element), config.train.micro_batch_size * model.seq_length
    heads, groups, columns = head_sizes(model)
    mixed = tokens * (heads + 2 * groups) * columns // shards * element
    context = tokens * heads * columns // shards * element
    hidden = tokens * model.hidden_size * element
    weights = model.hidden_size * (2 * heads + 2 * groups) * columns // shards
    projected = flops.attention - flops.core_attention
    yield from products(
        "attention", "projections", unit, Flops(projected, 2 * projected),
        ProductBytes(hidden + context, mixed + hidden, weights, element), launches=2,
    )  # fmt: skip
    core = flops.core_attention
    if is_relative(model):
        keys = RelativeShape.from_config(config, layout).num_keys
        mixed = mixed * keys // model.seq_length
    name, part = CORE_ATTENTION, "attention"
    has_scores = writes_scores(model, hardware.kernels)
    yield Kernel(part, name, FORWARD, unit, core, mixed, context, 2 if has_scores else 1)
    backward = 2 * core - flops.distances
    launches = 4 if has_scores else 3
    yield Kernel(part, name, BACKWARD, unit, backward, mixed + 2 * context, mixed, launches)
    if has_scores:
        scores = tokens * model.seq_length * heads // shards * element
        if is_relative(model):  # two kinds of scores, one of them shifted: two passes more each way
            scores = RelativeShape.from_config(config, layout).num_scores * element * 5 // 3
        yield moved(part, f"{name} scores", FORWARD, 3 * scores, 3 * scores, 5)
        yield moved(part, f"{name} scores", BACKWARD, 5 * scores, 3 * scores, 5)


def dense_mlp_kernels(config: RunConfig, layout: ParallelLayout) -> Iterator[Kernel]:
    """One layer without experts; its activation is element-wise work."""
    model, element = config.model, 2 if config.model.bf16 else 4
    forward = module_flops(config, layout).dense_mlp
    tokens = config.train.micro_batch_size * model.seq_length
    width = dense_ffn_size(model) // layout.tensor_model_parallel_size
    halves = 2 if model.gated_linear_unit else 1
    yield from mlp_kernels("dense MLP", tokens, model.hidden_size, width, halves, element, forward)


def mlp_kernels(
    part: str, tokens: int, hidden: int, width: int, halves: int, element: int, forward: int
) -> Iterator[Kernel]:
    """Two linear layers over ``tokens`` rows, this rank's ``width`` columns wide, of ``forward``
    operations; ``halves`` is 2 for a gated one."""
    rows = tokens * hidden
    tensors = ProductBytes(
        inputs=(rows + tokens * width) * element,
        outputs=(halves * tokens * width + rows) * element,
        weights=(halves + 1) * hidden * width,
        element=element,
    )
    unit = model_unit(element)
    yield from products(part, "products", unit, Flops(forward, 2 * forward), tensors, launches=2)
    yield from activation_kernels(f"activation of the {part}", tokens * width, halves, element)


def activation_kernels(name: str, outputs: int, halves: int, element: int) -> Iterator[Kernel]:
    """Of ``outputs`` activated elements. Gated: activation and product, unfused; backward both
    products, the activation's slope, and the two halves joined again."""
    size = outputs * element
    if not size:
        return
    forward, backward = ((3, 2, 2), (8, 5, 4)) if halves == 2 else ((1, 1, 1), (2, 1, 1))
    for phase, (read, written, launches) in ((FORWARD, forward), (BACKWARD, backward)):
        yield moved("element-wise", name, phase, read * size, written * size, launches)


def layer_element_wise(
    config: RunConfig, layout: ParallelLayout, layer: LayerShape
) -> Iterator[Kernel]:
    """Two norms, two residuals and rope of one layer."""
    model, element = config.model, layer.bytes_per_element
    hidden = layer.num_local_tokens * model.hidden_size * element
    part = "element-wise"
    yield moved(part, "norms", FORWARD, 2 * hidden, 2 * hidden, 2)
    yield moved(part, "norms", BACKWARD, 4 * hidden, 2 * hidden, 4)
    yield moved(part, "residuals", FORWARD, 4 * hidden, 2 * hidden, 2)
    yield moved(part, "residuals", BACKWARD, 4 * hidden, 2 * hidden, 2)
    if model.position_embedding_type == "rope":
        heads, groups, columns = head_sizes(model)
        tokens = config.train.micro_batch_size * model.seq_length
        turned = tokens * (heads + groups) * columns // layout.tensor_model_parallel_size * element
        for phase in (FORWARD, BACKWARD):
            yield moved(part, "rope", phase, 6 * turned, 5 * turned, 10)


def embedding_kernels(config: RunConfig, layer: LayerShape) -> Iterator[Kernel]:
    """Rows read forward; their gradients sorted and summed backward."""
    hidden = layer.num_local_tokens * config.model.hidden_size * layer.bytes_per_element
    yield moved("element-wise", "embedding", FORWARD, hidden, hidden, 3)
    yield moved("element-wise", "embedding", BACKWARD, 2 * hidden, hidden, 12)


def patch_kernels(config: RunConfig, layout: ParallelLayout, layer: LayerShape) -> Iterator[Kernel]:
    """Of images: patches cut, projected and put beside their positions; none has a gradient."""
    model, vision, element = config.model, config.vision, layer.bytes_per_element
    flops = module_flops(config, layout).patches
    inputs = layer.num_local_tokens * vision.patch_width * element
    hidden = layer.num_local_tokens * model.hidden_size * element
    weights = vision.patch_width * model.hidden_size
    yield from products(
        "element-wise", "patches", model_unit(element), Flops(flops, flops),
        ProductBytes(inputs, hidden, weights, element),
    )  # fmt: skip
    yield moved("element-wise", "patches cut", FORWARD, inputs, inputs)
    yield moved("element-wise", "positions", FORWARD, 2 * hidden, hidden)
    yield moved("element-wise", "positions", BACKWARD, hidden, hidden)


def output_layer_kernels(config: RunConfig, layout: ParallelLayout) -> Iterator[Kernel]:
    """The product with the vocabulary and the loss: forward logits to fp32, largest, difference,
    exponential, sum, quotient; backward product with the incoming gradient, and the cast."""
    model, element = config.model, 2 if config.model.bf16 else 4
    forward = module_flops(config, layout).output_layer
    answers, columns = logits_shape(config, layout)
    hidden, logits = answers * model.hidden_size, answers * columns
    unit, part = model_unit(element), "output layer"
    yield from products(
        part, "product", unit, Flops(forward, 2 * forward),
        ProductBytes(
            hidden * element, logits * element, model.hidden_size * columns, element
        ),
    )  # fmt: skip
    cast = element if element != FP32_BYTES else 0
    yield moved(
        part, "loss", FORWARD, logits * (cast + 5 * FP32_BYTES),
        logits * ((FP32_BYTES if cast else 0) + 3 * FP32_BYTES), 12,
    )  # fmt: skip
    yield moved(
        part, "loss", BACKWARD, logits * (FP32_BYTES + (FP32_BYTES if cast else 0)),
        logits * (FP32_BYTES + cast), 8,
    )  # fmt: skip
    if model.norm_placement == "post":
        return
    norm = config.train.micro_batch_size * model.seq_length * model.hidden_size * element
    yield moved("element-wise", "final norm", FORWARD, norm, norm)
    yield moved("element-wise", "final norm", BACKWARD, 2 * norm, norm, 2)
