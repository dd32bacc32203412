"""What the discrete path adds to a top-1 layer: search, read and combine over the layer's time.

T tokens, H hidden size, F expert hidden size, N experts, K codes: those of a rank of
``recipes/scale/billion_64.yaml`` whose micro-batches make 32768 tokens. The layer is ours with the
continuous path alone: router, dispatch, gated experts, forward and backward. Beside it, forward
and backward: the nearest codes, rows of the table weighed and added, the table's gradient.
"""

from __future__ import annotations

import torch

from vqmoe_megatron.bench.arms import own_submodules, transformer_config
from vqmoe_megatron.bench.cases import LayerCase
from vqmoe_megatron.bench.timing import Action, time_in_turns
from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.gpu_proof.part import Job
from vqmoe_megatron.moe.layer import VQMoELayer
from vqmoe_megatron.vq.combine import gather_scale_add, gather_scale_add_backward
from vqmoe_megatron.vq.search import nearest_code
from vqmoe_megatron.vq.segment_sum import segment_sum

MOST_SHARE = 0.10  # of the layer's time
NUM_WARMUP = 5


def measure_discrete_share(job: Job, num_repeats: int) -> None:
    """One row; a share above ``MOST_SHARE`` is a failed check on CUDA. No communication."""
    sizes = (8, 24, 64, 32, 48) if job.is_tiny else (64, 896, 32768, 1024, 320)
    case = LayerCase(*sizes, dtype="bfloat16" if job.device == "cuda" else "float32")
    device, dtype = torch.cuda.current_device(), getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device=device)

    config = transformer_config(
        case,
        1,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        normalization="RMSNorm",
    )
    vq = VQConfig(path="continuous", num_codes=case.num_codes)
    layer = VQMoELayer(config, own_submodules(), layer_number=1, vq=vq)
    layer.to(device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(draw(*parameter.shape) * parameter.shape[-1] ** -0.5)
    num_tokens, hidden = case.num_tokens, case.hidden_size
    leaf = draw(num_tokens, 1, hidden).to(dtype).requires_grad_()
    x, y, grad = leaf.detach()[:, 0], draw(num_tokens, hidden).to(dtype), torch.ones_like(leaf)
    codes, table = draw(case.num_codes, hidden), draw(case.num_codes, hidden)
    p_continuous, p_discrete = draw(num_tokens).sigmoid(), draw(num_tokens).sigmoid()
    ids = nearest_code(x, codes).unsqueeze(1)
    given = table, ids, 1.0, y, p_continuous, p_discrete

    def step() -> None:
        with torch.enable_grad():
            layer(leaf)[0].backward(grad)

    def forget() -> None:
        leaf.grad = None
        layer.zero_grad()

    def backward() -> None:
        gather_scale_add_backward(grad[:, 0], *given)
        segment_sum(grad[:, 0] * p_discrete.unsqueeze(1), ids[:, 0], case.num_codes)

    times = time_in_turns(
        {
            "layer": Action(step, forget),
            "search": Action(lambda: nearest_code(x, codes)),
            "forward": Action(lambda: gather_scale_add(*given, dtype)),
            "backward": Action(backward),
        },
        num_repeats,
        NUM_WARMUP,
    )
    milliseconds = {f"{name}_ms": one.median_ms for name, one in times.items()}
    layer_ms = milliseconds.pop("layer_ms")
    share = sum(milliseconds.values()) / layer_ms
    job.row(
        "The discrete path beside a top-1 layer",
        N=case.num_experts,
        K=case.num_codes,
        T=num_tokens,
        H=hidden,
        F=case.ffn_hidden_size,
        top1_layer_ms=layer_ms,
        **milliseconds,
        share=share,
    )
    job.say(f"search, read and combine take {share:.1%} of the top-1 layer's {layer_ms:.3f} ms")
    if job.device == "cuda" and not job.is_tiny:
        what = "search, read and combine over the time of the top-1 layer"
        job.within(what, share, MOST_SHARE)
