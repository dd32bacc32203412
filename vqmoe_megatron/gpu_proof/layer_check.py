"""Part ``correctness``: the layer equals the oracle, kernels equal their references, nothing waits.

T tokens, H hidden size, F expert hidden size, N experts, K codes, C code slices.

A layer with random weights and tokens runs on the device in fp32 or bf16; the oracle runs on the
CPU in fp64, with the same numbers. Output, the tokens' gradient and that of every parameter are
compared by name, within the tolerance of bench/gate.py. Tokens lie close to their code, and those
whose choice of experts hangs on rounding are left out, so that both choose alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch

from vqmoe_megatron.bench.arms import own_submodules, transformer_config
from vqmoe_megatron.bench.bench_world import one_rank_world
from vqmoe_megatron.bench.cases import LayerCase
from vqmoe_megatron.bench.gate import TOLERANCE, relative_difference
from vqmoe_megatron.bench.shared_inputs import CaseInputs, case_inputs
from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.gpu_proof.attempt import attempt
from vqmoe_megatron.gpu_proof.graph_capture import check_captured
from vqmoe_megatron.gpu_proof.host_reads import check_host_reads
from vqmoe_megatron.gpu_proof.kernel_checks import check_kernels
from vqmoe_megatron.gpu_proof.part import Job
from vqmoe_megatron.gpu_proof.table_overlap import check_overlap
from vqmoe_megatron.moe.layer import VQMoELayer
from vqmoe_megatron.vq.oracle import vqmoe_oracle

NUM_TOKENS, NUM_TINY_TOKENS = 32, 12
TOKEN_NOISE = 0.1
LEAST_LOGIT_GAP = 0.1  # between the last expert that is chosen and the first that is not
EXECUTIONS: dict[str, dict[str, Any]] = {
    "tokens": {"execution": "tokens"},
    "code space": {"execution": "code_space"},
    "table per step": {"execution": "code_space", "table_per_step": True},
}
SECONDS_PER_LAYER = 2.0  # with less left a layer is not begun


@dataclass(frozen=True)
class Variant:
    """What a layer is, apart from how it is executed."""

    vq: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # of Megatron
    topk: int = 1
    executions: tuple[str, ...] = tuple(EXECUTIONS)


SILU = {"activation_func": torch.nn.functional.silu, "gated_linear_unit": True}
VARIANTS = {
    "both paths": Variant(),
    "codes alone": Variant({"path": "discrete"}),
    "both paths, gated, RMSNorm, biases": Variant(
        config={**SILU, "normalization": "RMSNorm", "add_bias_linear": True}
    ),
    "product codes": Variant({"quantizer": "product", "num_code_slices": 4}),
    "gradients by groups": Variant({"straight_through": "group"}),
    "gradients identity": Variant({"straight_through": "identity"}),
    "no gradients": Variant({"straight_through": "none"}),
    "learned inputs, gated": Variant({"code_input": "learned"}, SILU),
    "low_dim codes": Variant({"quantizer": "low_dim", "code_dim": 16}),
    "cosine codes": Variant({"quantizer": "cosine"}),
    "shared norm, sigmoid": Variant({"norm": "shared", "combine": "sigmoid"}),
    "top-2": Variant(topk=2),
    "blend": Variant({"expert_input": "blend"}, executions=("tokens",)),
    "token": Variant({"expert_input": "token"}, executions=("tokens",)),
    "continuous, top-2": Variant({"path": "continuous"}, topk=2, executions=("tokens",)),
}
TINY_VARIANTS = ("both paths", "product codes", "continuous, top-2")


def run(job: Job) -> None:
    """Check layers, host reads, graphs and kernels. No communication."""
    with one_rank_world():
        check_layers(job)
        inputs = _step_inputs(job)
        check_host_reads(job, inputs)
        check_overlap(job, inputs)
        check_captured(job, inputs)
        check_kernels(job)


def _step_inputs(job: Job) -> CaseInputs:
    """Of whole steps that are watched, captured, or have their table built on a second stream."""
    is_tiny = job.is_tiny
    return case_inputs(
        LayerCase(
            num_experts=8,
            num_codes=24,
            num_tokens=48 if is_tiny else 2048,
            hidden_size=32 if is_tiny else 512,
            ffn_hidden_size=48 if is_tiny else 512,
            dtype="bfloat16" if job.device == "cuda" else "float32",
            norm="separate",
        )
    )


def check_layers(job: Job) -> None:
    """Hold every variant in every execution and both dtypes against the oracle."""
    job.say("layers against the oracle")
    for name, variant in VARIANTS.items():
        if job.is_tiny and name not in TINY_VARIANTS:
            continue
        for execution, dtype in product(variant.executions, TOLERANCE):
            what = f"{name}, {execution}, {dtype}"
            if not job.has_time(what, SECONDS_PER_LAYER):
                continue
            with attempt(job, what):
                differences = layer_differences(variant, execution, dtype, job.is_tiny)
                worst = max(differences, key=lambda tensor: _order(differences[tensor]))
                text = f"worst of {len(differences)} tensors: {worst}"
                job.within(what, differences[worst], TOLERANCE[dtype], text)
                job.row(
                    "Layers: difference from the oracle over the largest element",
                    variant=name,
                    execution=execution,
                    dtype=dtype,
                    worst=worst,
                    difference=differences[worst],
                    by_name=differences,
                )


def _order(difference: float) -> float:
    return float("inf") if difference != difference else difference


def layer_differences(
    variant: Variant, execution: str, dtype: str, is_tiny: bool
) -> dict[str, float]:
    """Return the relative difference of output and gradients by name.

    Raises:
        ValueError: when layer and oracle have gradients of different names.
    """
    case = LayerCase(
        num_experts=8,
        num_codes=24,
        num_tokens=NUM_TINY_TOKENS if is_tiny else NUM_TOKENS,
        hidden_size=32 if is_tiny else 64,
        ffn_hidden_size=48 if is_tiny else 128,
        dtype=dtype,
    )
    vq = VQConfig(
        **{
            "num_codes": case.num_codes,
            "init": "uniform",
            "dead_code_threshold": 0.0,
            # trained codes have a gradient to compare, but only fp32 weights can train them
            "codebook_update": "gradient" if dtype == "float32" else "ema",
            **EXECUTIONS[execution],
            **variant.vq,
        }
    )
    layer = VQMoELayer(
        transformer_config(case, variant.topk, **variant.config),
        own_submodules(),
        layer_number=1,
        vq=vq,
    )
    # As a model is moved before it trains: Megatron makes its router on the CPU.
    layer.to(device=torch.cuda.current_device(), dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(case.seed)
    _draw_parameters(layer, generator)
    x = _clear_tokens(layer, case, variant.topk, generator)
    weights = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
    found = _of_layer(layer, x, weights)
    expected = _of_oracle(layer, x, weights, case, variant)
    if set(found) != set(expected):
        only = sorted(set(found) ^ set(expected))
        raise ValueError(f"layer and oracle do not have the same gradients: {', '.join(only)}")
    return {name: relative_difference(found[name].cpu().double(), expected[name]) for name in found}


@torch.no_grad()
def _draw_parameters(layer: VQMoELayer, generator: torch.Generator) -> None:
    """Of a scale at which every term of the output matters."""
    for name, parameter in layer.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            drawn = 1.0 + 0.2 * drawn
        elif "bias" in name:
            drawn = 0.3 * drawn
        elif not name.endswith(("codes", "vectors")):
            drawn = drawn * parameter.shape[-1] ** -0.5
        parameter.copy_(drawn.to(parameter))
    for path in layer.discrete_paths:
        path.assigner.codebook.needs_data_init = False  # the codes are given


@torch.no_grad()
def _clear_tokens(
    layer: VQMoELayer, case: LayerCase, topk: int, generator: torch.Generator
) -> torch.Tensor:
    """[T, H] on the CPU in the layer's dtype: near a code each, with experts that are clear."""
    dtype, num_drawn = getattr(torch, case.dtype), 16 * case.num_tokens
    x = TOKEN_NOISE * torch.randn(num_drawn, case.hidden_size, generator=generator)
    if layer.discrete_paths:
        codebook = layer.assigner.codebook
        codes = codebook.code_vectors().float().cpu()  # [C, K, D]
        slices = torch.arange(codes.shape[0])
        ids = torch.randint(codes.shape[1], (num_drawn, codes.shape[0]), generator=generator)
        vectors = codes[slices, ids].flatten(1)
        if codebook.is_projected:
            vectors = vectors @ codebook.projection.float().cpu()
        x += vectors
    else:
        x /= TOKEN_NOISE
    x = x.to(dtype)
    if layer.router is None:
        return x[: case.num_tokens]
    logits = x.double() @ layer.router.weight.detach().cpu().double().t()
    if layer.router.bias is not None:
        logits += layer.router.bias.detach().cpu().double()
    best = logits.topk(topk + 1, dim=1).values
    clear = x[best[:, -2] - best[:, -1] > LEAST_LOGIT_GAP]
    if len(clear) < case.num_tokens:
        raise ValueError(f"only {len(clear)} of {num_drawn} tokens have clear experts")
    return clear[: case.num_tokens]


def _of_layer(layer: VQMoELayer, x: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients of sum(y * weights) and the VQ loss."""
    device = torch.cuda.current_device()
    own = x.to(device).unsqueeze(1).requires_grad_()  # [T, 1, H]
    output, _ = layer(own)
    (output[:, 0] * weights.to(device)).sum().backward()
    layer.finish_table()
    found = {"output": output.detach()[:, 0], "gradient of x": own.grad[:, 0]}
    return found | {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}


def _of_oracle(
    layer: VQMoELayer, x: torch.Tensor, weights: torch.Tensor, case: LayerCase, variant: Variant
) -> dict[str, torch.Tensor]:
    parameters = {
        name: parameter.detach().cpu().double().requires_grad_(parameter.requires_grad)
        for name, parameter in layer.named_parameters()
    }
    if layer.discrete_paths:
        codebook = layer.assigner.codebook
        parameters.setdefault("assigner.codebook.codes", codebook.codes.detach().cpu().double())
        if codebook.is_projected:
            projection = codebook.projection.detach().cpu().double()
            parameters["assigner.codebook.projection"] = projection
    leaf = x.double().requires_grad_()
    result = vqmoe_oracle(
        leaf,
        parameters,
        layer.vq,
        num_experts=case.num_experts,
        topk=variant.topk,
        activation=layer.config.activation_func,
        gated=layer.config.gated_linear_unit,
        normalization=layer.config.normalization,
    )
    ((result.output * weights.double()).sum() + result.vq_loss).backward()
    expected = {"output": result.output.detach(), "gradient of x": leaf.grad}
    return expected | {n: p.grad for n, p in parameters.items() if p.grad is not None}
