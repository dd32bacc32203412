"""StableMoE's router: learn to route, distil it into word embeddings, freeze (arXiv 2204.08396).

T tokens of a microbatch, N experts, H hidden size, V padded vocabulary, d ``router.light_dim``.

Stage 1, the first ``router.stage_1_steps`` optimizer steps:

    s = x e^T            e [N, H], no bias; a_t = argmax_i s[t, i]; weight w_t = sigmoid(s[t, a_t])
    balance loss         coeff / T sum_i (n_i - T / N) / (T / N) sum_{t: a_t = i} w_t
    light router         l = words[id_t] g^T           words [V, d], g [N, d]
    distillation loss    coeff mean_t cross-entropy(l[t], a_t)

n_i are the tokens of expert i, over all ranks of the microbatch. Stage 2: a_t = argmax_i l[t, i],
frozen, and the weight is sigmoid(s[t, a_t]) still, of the learned e. The light router sees the id
of a token and nothing else, so what is frozen is a table of one expert per id. Its weights keep
their place in the optimizer and are read no more. As in the authors' code the word embeddings are
the light router's own, not the model's, and evaluation routes by it in both stages.

``router.variant=released``, the form of VQMoE's release: one stage, e of unit length, softmax and
top-k and balance losses as Megatron has them, no light router.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import (
    get_tokens_per_expert_and_token_count,
    router_gating_linear,
)

from vqmoe_megatron.moe.backward_hook import run_in_backward
from vqmoe_megatron.moe.routers.hash import told_tokens
from vqmoe_megatron.moe.routers.step_router import ROUTER_DTYPES, CountsSteps


class StableMoERouter(CountsSteps):
    """Two stages of routing, or the release's one."""

    expert_of_token: torch.Tensor  # int64 [V], of stage 2; -1 before
    step_light: torch.Tensor  # fp32 [3]: cross-entropy, tokens the routers agree on, tokens

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.bias
        self.bias = None
        self.has_light = self.settings.variant == "published"
        self.is_frozen = False
        if not self.has_light:
            return
        if self.topk != 1 or self.routing_type not in ("aux_loss", "none"):
            raise ValueError(
                f"moe_router_topk={self.topk}, moe_router_load_balancing_type={self.routing_type}: "
                "StableMoE has one expert per token and a balance loss of its own; use 1, and "
                "aux_loss or none"
            )
        size, width = told_tokens(self).vocab_size, self.settings.light_dim
        self.stage_1_steps = self.setting("stage_1_steps")
        self.light_embedding_weight = self.new_weight(size, width)
        self.light_expert_weight = self.new_weight(self.num_experts, width)
        device = torch.cuda.current_device()
        table = torch.full((size,), -1, dtype=torch.int64, device=device)
        self.register_buffer("expert_of_token", table)
        self.register_buffer("step_light", torch.zeros(3, device=device), persistent=False)

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[S, B, H]`` -> scores ``[S, B, N]`` in ``moe_router_dtype``."""
        if self.has_light:
            return super().gating(input)
        dtype = ROUTER_DTYPES.get(self.config.moe_router_dtype, input.dtype)
        unit = torch.nn.functional.normalize(self.weight.to(dtype), dim=-1)
        return router_gating_linear(input, unit, None, dtype)

    @property
    def is_in_stage_2(self) -> bool:
        """Whether as many steps were taken as stage 1 has."""
        return self.num_steps >= self.stage_1_steps

    def forward(
        self, input: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states ``[S, B, H]`` -> weights and map ``[T, N]``.

        Communicates in stage 1, for the balance loss: token counts over ``tp_cp``.
        """
        if not self.has_light:
            return super().forward(input, *args, **kwargs)
        if self.is_in_stage_2 and not self.is_frozen:
            self._freeze()
        ids = told_tokens(self).own_ids(input)
        scores = self.gating(input).flatten(0, 1)
        if self.is_frozen:
            chosen = self.expert_of_token[ids]
        elif self.training:
            chosen = scores.detach().argmax(dim=1)
        else:
            chosen = self._light_scores(ids, scores.dtype).argmax(dim=1)
        routing_map = torch.nn.functional.one_hot(chosen, self.num_experts).bool()
        probs = torch.sigmoid(scores) * routing_map
        if self.is_trained_now:
            probs = self._attach(probs, routing_map, chosen, ids)
        return probs, routing_map

    def _light_scores(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Token ids ``[T]`` -> l ``[T, N]``."""
        words = torch.nn.functional.embedding(ids, self.light_embedding_weight)
        return words.to(dtype) @ self.light_expert_weight.to(dtype).t()

    @torch.no_grad()
    def _freeze(self) -> None:
        """Write down the light router's expert of every id: equal on all ranks, which hold equal
        weights. No communication."""
        every = torch.arange(self.expert_of_token.numel(), device=self.expert_of_token.device)
        dtype = torch.promote_types(self.light_expert_weight.dtype, torch.float32)
        for part in every.split(2**16):
            self.expert_of_token[part] = self._light_scores(part, dtype).argmax(dim=1)
        self.is_frozen = True

    def _attach(
        self,
        probs: torch.Tensor,
        routing_map: torch.Tensor,
        chosen: torch.Tensor,
        ids: torch.Tensor,
    ) -> torch.Tensor:
        if self.is_frozen:
            # With weight zero: an overlapped reduction waits for every parameter of the layer.
            unused = self.light_embedding_weight.sum() + self.light_expert_weight.sum()
            return self.attach_loss(probs, 0.0 * unused.to(probs.dtype))
        light = self._light_scores(ids, probs.dtype)
        loss = torch.nn.functional.cross_entropy(light, chosen)
        agreed = (light.detach().argmax(dim=1) == chosen).sum()
        num_tokens = torch.full_like(agreed, chosen.numel())
        sums = torch.stack([loss.detach() * num_tokens, agreed, num_tokens])
        if coeff := self.get_aux_loss_coeff("aux_loss"):
            probs = self._attach_balance(probs, routing_map, coeff)
        probs = self.attach_loss(probs, self.settings.distill_coeff * loss)
        return run_in_backward(probs, lambda: self._record(sums))

    def _attach_balance(
        self, probs: torch.Tensor, routing_map: torch.Tensor, coeff: float
    ) -> torch.Tensor:
        counts, num_local, _ = get_tokens_per_expert_and_token_count(
            routing_map=routing_map, reduce_group=self.tp_cp_group, topk=self.topk
        )
        counts = counts.to(probs.dtype)
        num_tokens = counts.sum()  # T
        over = counts * self.num_experts / num_tokens - 1.0  # [N]
        loss = coeff * (probs.sum(dim=0) * over).sum() / num_tokens  # probs are zero elsewhere
        return self.attach_and_log_load_balancing_loss(
            probs,
            coeff,
            loss,
            "load_balancing_loss",
            self.tp_cp_group,
            valid_token_count=num_local,
        )

    def _record(self, sums: torch.Tensor) -> None:
        self.step_light += sums.to(self.step_light.dtype)

    def local_parts(self) -> list[torch.Tensor]:
        """What the light router learned from."""
        return [self.step_light] if self.has_light else []

    def scalars_of(self, parts: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Distillation loss and agreement of stage 1; nothing to tell from then on."""
        if not self.has_light:
            return {}
        loss, agreed, tokens = next(parts).unbind()
        num_tokens = tokens.clamp(min=1.0)
        frozen = torch.full_like(loss, float(self.is_frozen))
        return {
            "distillation_loss": loss / num_tokens,
            "light_router_agreement": agreed / num_tokens,
            "routing_frozen": frozen,
        }

    def clear_step(self) -> None:
        """Forget the sums."""
        if self.has_light:
            self.step_light.zero_()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.has_light:  # nothing is written down before the first pass of stage 2
            self.is_frozen = bool((self.expert_of_token >= 0).all())
