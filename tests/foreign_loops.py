"""In a rank: training loops that a user might write around the layer, and what its codes did."""

from __future__ import annotations

import torch

from vqmoe_megatron.config import VQConfig

BASE = {"num_codes": 12, "ema_decay": 0.8}


def build(settings: dict, **changes):  # noqa: ANN201
    """A layer with drawn parameters in training mode, and a stream of microbatches for it."""
    from tiny_layer import HIDDEN, build_layer, draw_parameters

    vq = VQConfig(**{**BASE, **settings})
    layer = build_layer(vq, {n: p.float() for n, p in draw_parameters(vq).items()}, **changes)
    generator = torch.Generator().manual_seed(3 + torch.distributed.get_rank())

    def microbatches():  # noqa: ANN202
        while True:
            yield torch.randn(6, 2, HIDDEN, generator=generator)

    return layer, microbatches()


def steps_of(layer) -> int:  # noqa: ANN001
    return int(layer.assigner.codebook.num_steps)


def plain_torch(settings: dict, num_steps: int, num_microbatches: int, is_recomputed: bool) -> dict:
    """torch's optimizer, gradient accumulation; nobody calls anything of ours."""
    layer, stream = build(settings)
    layer.moe_layer_recompute = is_recomputed
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    counted, codes = [], []
    for _ in range(num_steps):
        optimizer.zero_grad()
        for _ in range(num_microbatches):
            x = next(stream).requires_grad_()
            layer(x)[0].square().mean().backward()
        counted.append(float(layer.step_gate[1]))
        optimizer.step()
        codes.append(layer.assigner.codebook.codes.detach().clone())
    return {"steps": steps_of(layer), "tokens": counted, "codes": codes}


def two_optimizers(num_steps: int) -> int:
    """Two optimizers step one after the other, as Megatron's chained ones do."""
    layer, stream = build({})
    halves = list(layer.parameters())
    halves = [p for p in halves if p.requires_grad]
    optimizers = [torch.optim.SGD(halves[::2], lr=1e-2), torch.optim.SGD(halves[1::2], lr=1e-2)]
    for _ in range(num_steps):
        layer(next(stream))[0].sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return steps_of(layer)


def by_hand(how: str) -> list:
    """Weights moved without an optimizer of torch; what the second step is told."""
    layer, stream = build({})
    told = []
    for _ in range(3):
        try:
            layer(next(stream))[0].sum().backward()
        except ValueError as error:
            told.append(str(error))
            break
        told.append("")
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.grad is not None:
                    if how == "data":
                        parameter.data -= 0.1 * parameter.grad
                    else:
                        parameter.sub_(0.1 * parameter.grad)
                    parameter.grad = None
    return told


def by_hand_after_a_step() -> list[str]:
    """One step of an optimizer, then weights moved by hand; what each forward pass is told."""
    layer, stream = build({})
    optimizer = torch.optim.SGD(trained(layer), lr=1e-2)
    told = []
    for number in range(4):
        try:
            layer(next(stream))[0].sum().backward()
        except ValueError as error:
            return [*told, str(error)]
        told.append("")
        if number == 0:
            optimizer.step()
        else:
            with torch.no_grad():
                for parameter in trained(layer):
                    parameter -= 0.1 * parameter.grad
        layer.zero_grad()
    return told


def two_rates() -> list[int]:
    """Two layers of one configuration, whose optimizers step at every, and every 4th microbatch."""
    first, stream = build({})
    second, _ = build({})
    second.config = first.config
    optimizers = [torch.optim.SGD(trained(layer), lr=1e-2) for layer in (first, second)]
    for number in range(1, 9):
        second(first(next(stream))[0])[0].square().mean().backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        if number % 4 == 0:
            optimizers[1].step()
            optimizers[1].zero_grad()
    return [steps_of(first), steps_of(second)]


def with_a_closure(kind: str) -> list:
    """What the second step with a closure is told, and whether the weights moved in it."""
    layer, stream = build({})
    optimizer = getattr(torch.optim, kind)(trained(layer), lr=1e-2)

    def closure():  # noqa: ANN202
        optimizer.zero_grad()
        loss = layer(next(stream))[0].square().mean()
        loss.backward()
        return loss

    told = ""
    for _ in range(2):
        before = layer.experts.weight1.detach().clone()
        try:
            optimizer.step(closure)
        except ValueError as error:
            told = str(error)
            break
    return [told, bool(torch.equal(before, layer.experts.weight1))]


def under_autocast() -> str:
    """What a layer of fp32 weights is told in torch's mixed precision."""
    layer, stream = build({})
    try:
        with torch.autocast("cpu", torch.bfloat16):
            layer(next(stream))
    except ValueError as error:
        return str(error)
    return ""


def by_hand_with_a_call(num_steps: int) -> int:
    """The same, told how: one call per step."""
    from vqmoe_megatron.moe import synchronize_codebooks

    layer, stream = build({})
    for _ in range(num_steps):
        layer(next(stream))[0].sum().backward()
        synchronize_codebooks(layer)  # as the message says
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.1 * parameter.grad)
                    parameter.grad = None
    return steps_of(layer)


def table_without_a_schedule() -> list:
    """A kept table whose gradient nobody brings to the weights: what the optimizer's step is told,
    and whether the weights moved."""
    layer, stream = build({"table_per_step": True})
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    before = layer.experts.weight1.detach().clone()
    layer(next(stream))[0].sum().backward()
    try:
        optimizer.step()
    except ValueError as error:
        return [str(error), bool(torch.equal(before, layer.experts.weight1))]
    return ["", False]


def early_reduction() -> str:
    """What a kept table is told where gradients are reduced during the last backward pass."""
    try:
        with_megatrons_schedule({"table_per_step": True}, "finalize", [False], overlap=True)
    except ValueError as error:
        return str(error)
    return ""


def with_megatrons_schedule(
    settings: dict, hook: str, skips: list[bool], overlap: bool = False
) -> dict:
    """Megatron's schedule and a torch optimizer; ``hook`` is what the loop makes the finalise
    function, and a step with ``skips`` has no optimizer step."""
    from functools import partial

    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from vqmoe_megatron.moe import CodebookSync

    class Wrapped(torch.nn.Module):
        def __init__(self, layer) -> None:  # noqa: ANN001
            super().__init__()
            self.config, self.layer = layer.config, layer
            self.model_type = ModelType.encoder_or_decoder

        def set_input_tensor(self, _tensor: object) -> None:
            pass

        def forward(self, x):  # noqa: ANN001, ANN202
            return self.layer(x)[0]

    layer, stream = build(settings)
    config = layer.config
    ddp_config = DistributedDataParallelConfig(overlap_grad_reduce=overlap)
    model = DistributedDataParallel(config, ddp_config, Wrapped(layer))
    sync = CodebookSync()
    hooks = {
        "finalize": finalize_model_grads,
        "partial": partial(finalize_model_grads),
        "none": None,
        "sync": sync,
        "sync in a function": lambda *args, **kwargs: sync(*args, **kwargs),
    }
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    states, grads = [], []
    for is_skipped in skips:
        config.finalize_model_grads_func = hooks[hook]
        model.zero_grad_buffer()
        get_forward_backward_func()(
            forward_step_func=lambda data, m: (m(next(data)), lambda y: (y.square().mean(), {})),
            data_iterator=stream,
            model=model,
            num_microbatches=3,
            seq_length=6,
            micro_batch_size=2,
            forward_only=False,
        )
        if hook == "none":
            finalize_model_grads([model])
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.grad = parameter.main_grad.clone()
        grads.append(layer.experts.weight1.grad.clone())
        if not is_skipped:
            optimizer.step()
        states.append([steps_of(layer), float(layer.assigner.codebook.usage.sum())])
    return {
        "states": states,
        "codes": layer.assigner.codebook.codes.detach().clone(),
        "grads": grads,
    }


class OneLayer(torch.nn.Module):
    """A model of layers one after the other, for Megatron's schedule."""

    def __init__(self, *layers) -> None:  # noqa: ANN002
        super().__init__()
        from megatron.core.enums import ModelType

        self.config, self.layers = layers[0].config, torch.nn.ModuleList(layers)
        self.model_type = ModelType.encoder_or_decoder

    def set_input_tensor(self, _tensor: object) -> None:
        pass

    def forward(self, x):  # noqa: ANN001, ANN202
        for layer in self.layers:
            x = layer(x)[0]
        return x


def scheduled(stream, *layers, forward=None):  # noqa: ANN001, ANN002, ANN201
    """One call of Megatron's schedule over these layers in DDP; gradients are then in ``grad``."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    config = layers[0].config
    if not hasattr(layers[0], "in_ddp"):
        model = DistributedDataParallel(config, DistributedDataParallelConfig(), OneLayer(*layers))
        layers[0].in_ddp = [model]  # in a list: it is no submodule
        config.finalize_model_grads_func = finalize_model_grads
    (model,) = layers[0].in_ddp
    model.zero_grad_buffer()
    forward = forward or (lambda m, x: m(x))
    get_forward_backward_func()(
        forward_step_func=lambda data, m: (
            forward(m, next(data)),
            lambda y: (y.square().mean(), {}),
        ),
        data_iterator=stream,
        model=model,
        num_microbatches=2,
        seq_length=6,
        micro_batch_size=2,
        forward_only=False,
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = parameter.main_grad.clone()


def trained(*layers):  # noqa: ANN002, ANN201
    return [p for layer in layers for p in layer.parameters() if p.requires_grad]


def schedule_and_then(way: str) -> list:
    """Megatron's schedule, and weights moved by hand; or a look at the model before the step."""
    layer, stream = build({})
    optimizer = torch.optim.SGD(trained(layer), lr=1e-2)
    found: list = []
    for _ in range(3):
        try:
            scheduled(stream, layer)
        except ValueError as error:
            return [*found, str(error)]
        if way == "data":
            for parameter in trained(layer):
                parameter.data -= 0.1 * parameter.grad
        else:
            with torch.no_grad():
                layer(next(stream))
            optimizer.step()
        found.append(steps_of(layer))
    return found


def two_models(is_shared: bool, is_scheduled: bool) -> list[list[int]]:
    """Both are differentiated, then both optimizers step, twice; code steps after each."""
    one, stream = build({})
    two, _ = build({})
    if is_shared:
        two.config = one.config
    optimizers = [torch.optim.SGD(trained(layer), lr=1e-2) for layer in (one, two)]
    found = []
    for _ in range(2):
        for layer in (one, two):
            if is_scheduled:
                scheduled(stream, layer)
            else:
                layer(next(stream))[0].sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            found.append([steps_of(one), steps_of(two)])
    return found


def stranger(kind: str) -> list[int]:
    """An optimizer of something else steps between two microbatches; then the layer's own."""
    layer, stream = build({})
    other = torch.zeros(1, requires_grad=True)
    if kind == "parameter":
        other = torch.nn.Parameter(other.detach())
    other.grad = torch.ones(1)
    layer(next(stream))[0].sum().backward()
    torch.optim.SGD([other], lr=0.1).step()
    found = [steps_of(layer)]
    layer(next(stream))[0].sum().backward()
    torch.optim.SGD(trained(layer), lr=0.1).step()
    return [*found, steps_of(layer)]


def frozen_below() -> list[list]:
    """Twelve steps of two layers of which the lower is frozen: code steps, and codes unmoved."""
    below, stream = build({"dead_code_threshold": 0.5})
    above, _ = build({"dead_code_threshold": 0.5})
    above.config = below.config
    for parameter in below.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD(trained(above), lr=1e-3)
    before = [layer.assigner.codebook.codes.detach().clone() for layer in (below, above)]
    for _ in range(12):
        scheduled(stream, below, above)
        optimizer.step()
    return [
        [steps_of(layer), bool(torch.equal(codes, layer.assigner.codebook.codes))]
        for layer, codes in zip((below, above), before, strict=True)
    ]


def unused_on_one_rank() -> list[int]:
    """Rank 1 passes the layer by in the second step."""
    layer, stream = build({})
    optimizer = torch.optim.SGD(trained(layer), lr=1e-2)
    found = []
    for step in range(3):
        is_unused = step == 1 and torch.distributed.get_rank() == 1

        def forward(model, x, is_unused=is_unused):  # noqa: ANN001, ANN202
            return x.requires_grad_() * 1.0 if is_unused else model(x)

        scheduled(stream, layer, forward=forward)
        optimizer.step()
        found.append(steps_of(layer))
    return found


def half_precision(update: str, is_frozen: bool, in_router: bool) -> str:
    """What bf16 training with codes of this kind is told at its first forward pass."""
    from tiny_layer import HIDDEN, transformer_config

    from vqmoe_megatron.moe import VQRouter

    settings = {"codebook_update": update, "freeze_codebook": is_frozen}
    if in_router:
        config = transformer_config(bf16=True, params_dtype=torch.bfloat16)
        vq = VQConfig(num_codes=12, path="discrete", expert_input="token", **settings)
        module = VQRouter(config, vq=vq)
    else:
        from megatron.core.transformer.moe.moe_layer import MoESubmodules
        from megatron.core.transformer.spec_utils import ModuleSpec

        from vqmoe_megatron.moe import GroupedExperts, VQMoELayer

        config = transformer_config(bf16=True, params_dtype=torch.bfloat16)
        experts = MoESubmodules(experts=ModuleSpec(module=GroupedExperts))
        module = VQMoELayer(config, experts, 1, vq=VQConfig(num_codes=12, **settings))
    module.set_layer_number(1)
    try:
        module(torch.randn(4, 2, HIDDEN, dtype=torch.bfloat16))
    except ValueError as error:
        return str(error)
    return ""
