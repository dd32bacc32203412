"""What a model chooses and loses on given text: choices of every layer, loss of every token.

b sequences, S tokens each, T = S * b, H hidden size, k choices per token, n experts or codes.

Choices are asked of the layer's paths (``path.ask``), so that any router and any quantizer is read
alike. They are asked within the model's forward pass, before the layer runs, since a path may know
more of its tokens than their hidden states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from vqmoe_megatron.analysis.loaded_model import LoadedModel
from vqmoe_megatron.moe.code_assigner import CodeAssigner
from vqmoe_megatron.moe.layer import VQMoELayer
from vqmoe_megatron.moe.paths import Path
from vqmoe_megatron.tasks.task import Batch

EXPERTS, EXPERTS_OF_CODES = "experts", "experts by code"
Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Choices:
    """What one path of one layer chose."""

    layer: int  # from 1
    kind: str  # EXPERTS, EXPERTS_OF_CODES; codes, with a slice's number where there are several
    ids: torch.Tensor  # int64 [T, k] on the CPU, or [R, 1] where tokens have any number of them
    num_ids: int  # n
    is_per_token: bool

    @property
    def is_code(self) -> bool:
        """Whether codes were chosen, and not experts."""
        return self.kind not in (EXPERTS, EXPERTS_OF_CODES)

    @property
    def key(self) -> str:
        """Layer and kind, by which choices of two models are put side by side."""
        return f"layer {self.layer} {self.kind}"


@dataclass(frozen=True)
class Observation:
    """One pass over text; all on the CPU."""

    tokens: torch.Tensor  # int64 [T], what was read
    places: torch.Tensor  # int64 [T], within their window
    window: torch.Tensor  # int64 [T], which
    choices: dict[str, Choices]  # by key
    errors: dict[str, float]  # of codes: |x - v|^2 / |x|^2, mean over tokens, by key
    loss: float  # nats per scored token


def observe(
    model: LoadedModel,
    batches: Iterable[Batch],
    change_tokens: Change | None = None,
    change_embedding: Change | None = None,
) -> Observation:
    """Read all ``batches`` without gradients; scored tokens (``loss_mask``) only.

    ``change_tokens`` disturbs what is read, ``[b, S]``, not what is to be predicted;
    ``change_embedding`` its embedding ``[S, b, H]``. Communicates within this process' world.
    """
    seen: dict[str, list[torch.Tensor]] = {}
    about: dict[str, Choices] = {}
    errors: dict[str, list[float]] = {}
    kept: torch.Tensor | None = None  # bool [T] of the batch

    def see(layer: VQMoELayer, hidden_states: torch.Tensor) -> None:
        for found, error in _asked(layer, hidden_states):
            ids = found.ids[kept] if found.is_per_token else found.ids
            about.setdefault(found.key, found)
            seen.setdefault(found.key, []).append(ids)
            if error is not None:
                errors.setdefault(found.key, []).append(float(error[kept].mean()))

    total, num_scored = 0.0, 0
    tokens, places, windows, num_windows = [], [], [], 0
    with torch.no_grad(), watched(model, see), changed_embedding(model, change_embedding):
        for batch in batches:
            read = batch["tokens"] if change_tokens is None else change_tokens(batch["tokens"])
            mask = batch["loss_mask"]
            kept = mask.t().reshape(-1) > 0  # hidden states are [S, b, H]
            losses = losses_of(model, read, batch)
            total += float((losses * mask).double().sum())
            num_scored += int(mask.sum())
            tokens.append(read.t().reshape(-1)[kept])
            places.append(batch["position_ids"].t().reshape(-1)[kept])
            number = torch.arange(num_windows, num_windows + len(read)).expand(read.shape[1], -1)
            windows.append(number.reshape(-1)[kept])
            num_windows += len(read)
    choices = {
        key: Choices(c.layer, c.kind, torch.cat(seen[key]), c.num_ids, c.is_per_token)
        for key, c in about.items()
    }
    return Observation(
        tokens=torch.cat(tokens),
        places=torch.cat(places),
        window=torch.cat(windows),
        choices=choices,
        errors={key: sum(parts) / len(parts) for key, parts in errors.items()},
        loss=total / max(1, num_scored),
    )


def losses_of(model: LoadedModel, tokens: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Loss in nats of every token ``[b, S]``, on the CPU where gradients are off."""
    device = next(model.module.parameters()).device
    given = (tokens, batch["position_ids"], batch["labels"])
    tokens, position_ids, labels = (tensor.to(device) for tensor in given)
    losses = model.module(tokens, position_ids, None, labels=labels)
    return losses if torch.is_grad_enabled() else losses.cpu()


@contextlib.contextmanager
def watched(model: LoadedModel, see: Callable[[VQMoELayer, torch.Tensor], None]) -> Iterator[None]:
    """While entered, ``see`` is given every layer and its hidden states ``[S, b, H]``, before the
    layer runs."""

    def hook(layer: VQMoELayer, args: tuple, kwargs: dict) -> None:
        see(layer, args[0] if args else kwargs["hidden_states"])

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def changed_embedding(model: LoadedModel, change: Change | None) -> Iterator[None]:
    """While entered, the embedding's output ``[S, b, H]`` goes through ``change``."""
    if change is None:
        yield
        return
    handle = model.module.embedding.register_forward_hook(lambda _, __, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def code_assigners(path: Path) -> dict[str, CodeAssigner]:
    """The codebooks of a path by what their codes are called; none of most."""
    found = {"codes": getattr(path, "assigner", None)}
    found["memory codes"] = getattr(getattr(path, "hidden", None), "assigner", None)
    return {name: assigner for name, assigner in found.items() if assigner is not None}


def _asked(
    layer: VQMoELayer, hidden_states: torch.Tensor
) -> Iterator[tuple[Choices, torch.Tensor | None]]:
    """Choices of every path on ``[S, b, H]``, and of codes the relative error ``[T]``."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    num_experts = layer.config.num_moe_experts
    for path in layer.paths:
        experts = path.ask(hidden_states, x).experts
        if experts.numel() and num_experts > 1:
            kind = EXPERTS_OF_CODES if path.is_discrete else EXPERTS
            any_number = getattr(path, "threshold", None) is not None
            is_per_token = experts.shape[0] == x.shape[0] and not any_number
            ids = experts.detach().cpu()
            yield Choices(layer.layer_number, kind, ids, num_experts, is_per_token), None
        for name, assigner in code_assigners(path).items():
            assignment = assigner(x)
            codes, num_slices = assignment.codes.cpu(), assignment.codes.shape[1]
            prepared = assignment.prepared.float()
            missed = prepared - assigner.codebook.lookup(assignment.codes).reshape(prepared.shape)
            error = missed.square().sum(1) / prepared.square().sum(1).clamp(min=1e-12)
            for number in range(num_slices):
                kind = name if num_slices == 1 else f"{name} {number + 1}"
                chosen = codes[:, number : number + 1]
                found = Choices(layer.layer_number, kind, chosen, assigner.codebook.num_codes, True)
                yield found, error.cpu()
