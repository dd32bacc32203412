"""Runs in the checkout's interpreter: the documented Python API, as one line of JSON.

Names, parameters and defaults of what the documentation names, a model of one's own trained as in
the README, and the small pieces on fixed numbers.
"""

from __future__ import annotations

from vqmoe_megatron.runtime.cpu_compat import install_cpu_compat

install_cpu_compat()  # before anything imports Megatron

import dataclasses  # noqa: E402
import functools  # noqa: E402
import importlib  # noqa: E402
import inspect  # noqa: E402
import json  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from read_run import hashed  # noqa: E402

from vqmoe_megatron import moe, vq  # noqa: E402
from vqmoe_megatron.config import RunConfig, VQConfig  # noqa: E402

MODULES = ("vqmoe_megatron.moe", "vqmoe_megatron.vq", "vqmoe_megatron.config")
TABLE_MODULE = "vqmoe_megatron.vq.table_layer"
TABLE_NAMES = ("TableLayer", "TableSettings", "load_table_layer")
NUM_STEPS, VOCAB_SIZE, SEQUENCE = 8, 64, 32


def parameters_of(named: Any) -> str:
    """Return names, kinds and defaults of the parameters; of an object its type."""
    if not callable(named):
        return type(named).__name__
    shown = [
        f"{item.name} ({item.kind.description})"
        + ("" if item.default is item.empty else f" = {shown_default(item.default)}")
        for item in inspect.signature(named).parameters.values()
    ]
    return ", ".join(shown)


def shown_default(value: Any) -> str:
    """A function by its name, without its address."""
    return value.__qualname__ if callable(value) else repr(value)


def surface() -> dict[str, Any]:
    """Return public names with their parameters, and every recipe key with type and default."""
    found: dict[str, Any] = {"METRIC_NAMES": dict(moe.METRIC_NAMES)}
    for module_name in (*MODULES, TABLE_MODULE):
        module = importlib.import_module(module_name)
        for name in sorted(getattr(module, "__all__", TABLE_NAMES)):
            found[f"{module_name}.{name}"] = parameters_of(getattr(module, name))
    for section in dataclasses.fields(RunConfig):
        defaults = section.default_factory()  # type: ignore[misc]
        for key in dataclasses.fields(defaults):
            value = getattr(defaults, key.name)
            found[f"key {section.name}.{key.name}"] = f"{key.type} = {value!r}"
    return found


def transformer() -> TransformerConfig:
    """Return the README's model, smaller."""
    return TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_moe_experts=4,
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
    )


def trained(name: str, settings: VQConfig) -> dict[str, Any]:
    """Train a model of one's own in a loop written by hand; losses, and every tensor at the end."""
    model_parallel_cuda_manual_seed(1234)
    torch.manual_seed(1234)
    config = transformer()
    model = GPTModel(
        config,
        moe.get_vqmoe_layer_spec(config, settings),
        vocab_size=VOCAB_SIZE,
        max_sequence_length=SEQUENCE,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(NUM_STEPS):
        tokens = torch.randint(VOCAB_SIZE // 4, (4, SEQUENCE + 1))
        positions = torch.arange(SEQUENCE).expand(4, -1)
        loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tensors = {
        f"{name}: {key}": hashed(value)
        for key, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    return {f"{name}: losses": losses, **tensors}


def pieces() -> dict[str, Any]:
    """Return what the router and the search give for fixed numbers."""
    torch.manual_seed(5)
    x, codes = torch.randn(40, 32), torch.randn(8, 32)
    model_parallel_cuda_manual_seed(7)
    router = functools.partial(moe.VQRouter, vq=VQConfig(num_codes=8, expert_input="token"))
    probabilities, routing_map = router(transformer())(x.reshape(40, 1, 32))[:2]
    return {
        "nearest_code": vq.nearest_code(x, codes).tolist(),
        "VQRouter: probabilities": hashed(probabilities),
        "VQRouter: routing map": hashed(routing_map),
    }


def main() -> None:
    """Print one line of JSON."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    found = surface()
    found |= trained("dual, ema", VQConfig(num_codes=16, codebook_update="ema"))
    found |= trained("blend, gradient", VQConfig(expert_input="blend", codebook_update="gradient"))
    found |= pieces()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
