"""The layer as the VQMoE release computes it: plain torch on one device, one expert at a time.

T tokens, H hidden size, N experts, F expert hidden size, K codes, c the contribution rate.

As in the release (github giangdip2410/VQMoE, 2025-08):
    - all [T, K] distances, an argmin, a one-hot [T, K] matrix times the codebook;
    - straight-through as x + sg(v - x); blend as (1 - c) x + c sg(v - x);
    - a Python loop over experts, with torch.where finding each one's tokens (a host
      synchronisation each), twice when both paths run;
    - the codebook follows the VQ loss.
Otherwise than in the release the continuous weight is the router's softmax over all experts, as in
the other arms: there it is 1, a softmax over one logit. That costs and saves nothing.
"""

from __future__ import annotations

import torch

from vqmoe_megatron.config import VQConfig


class ReleasedLayer(torch.nn.Module):
    """Discrete path, or both; codes or blend as expert input.

    Args:
        vq: path, expert_input, norm and the loss coefficients are read.
        codes: ``[K, H]``, copied.
        shared: the shared parameters by name, experts stacked.

    Raises:
        ValueError: for an expert input that the release does not have.
    """

    def __init__(
        self, vq: VQConfig, codes: torch.Tensor, shared: dict[str, torch.nn.Parameter]
    ) -> None:
        super().__init__()
        if vq.expert_input not in ("code", "blend"):
            raise ValueError(f"the release has no expert_input={vq.expert_input}")
        self.vq = vq
        self.codes = torch.nn.Parameter(codes.detach().clone())
        self.shared = shared
        self.experts = {
            name: [torch.nn.Parameter(view) for view in shared[f"experts.{name}"].data.unbind(0)]
            for name in ("weight1", "weight2")
        }

    def named(self) -> dict[str, list[torch.nn.Parameter]]:
        """Return what is used of the shared parameters, experts one by one."""
        found = {f"experts.{name}": parts for name, parts in self.experts.items()}
        names = []
        if self.vq.path == "dual":
            names += ["router.weight", "gate.linear.weight", "gate.linear.bias"]
        if self.vq.norm != "none":
            names += ["input_norm.weight", "input_norm.bias"]
        if self.vq.norm == "separate":
            names += ["output_norm.weight", "output_norm.bias"]
        return {**found, **{name: [self.shared[name]] for name in names}}

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``[S, B, H]`` -> output of that shape and, in training, the VQ loss. No
        communication."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        ids, quantized = self._quantize(x)
        y = self._discrete(x, ids % len(self.experts["weight1"]), quantized)
        if self.vq.path == "dual":
            logits = torch.nn.functional.linear(
                x, self.shared["gate.linear.weight"], self.shared["gate.linear.bias"]
            )
            gate = logits.softmax(dim=-1, dtype=torch.float32)
            y = gate[:, :1] * self._continuous(x) + gate[:, 1:] * y
        y = y.to(x.dtype).view_as(hidden_states)
        if not self.training:
            return y, None
        error = self.vq.commitment_coeff * (x.float() - quantized.detach()).square().mean()
        error = error + (x.detach().float() - quantized).square().mean()
        return y, self.vq.vq_loss_coeff * error

    def _quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, H] -> codes int64 [T] and their vectors fp32 [T, H]."""
        with torch.no_grad():
            tokens = x.float()
            distances = (
                tokens.square().sum(dim=1, keepdim=True)
                + self.codes.square().sum(dim=1)
                - 2 * tokens @ self.codes.t()
            )
            ids = distances.argmin(dim=1)
            one_hot = torch.zeros_like(distances).scatter_(1, ids.unsqueeze(1), 1.0)
        return ids, one_hot @ self.codes

    def _discrete(
        self, x: torch.Tensor, experts: torch.Tensor, quantized: torch.Tensor
    ) -> torch.Tensor:
        vectors, rate = quantized.detach().to(x.dtype), self.vq.contribution_rate
        if self.vq.expert_input == "blend":
            u = (1 - rate) * x + rate * (vectors - x).detach()
        else:
            u = x + (vectors - x).detach()
        y = self._loop(self._norm(u, "input_norm"), experts)
        return self._norm(y, "input_norm" if self.vq.norm == "shared" else "output_norm")

    def _continuous(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(x, self.shared["router.weight"])
        weight, expert = logits.softmax(dim=-1, dtype=torch.float32).max(dim=-1)
        return self._loop(x, expert) * weight.unsqueeze(1).to(x.dtype)

    def _loop(self, rows: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Evaluate one expert after the other on the rows [T, H] that are its own."""
        y = torch.zeros_like(rows)
        pairs = zip(self.experts["weight1"], self.experts["weight2"], strict=True)
        for expert, (weight1, weight2) in enumerate(pairs):
            (own,) = torch.where(experts == expert)
            if own.numel() == 0:
                continue
            hidden = torch.nn.functional.gelu(torch.nn.functional.linear(rows[own], weight1))
            y.index_add_(0, own, torch.nn.functional.linear(hidden, weight2))
        return y

    def _norm(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        if self.vq.norm == "none":
            return rows
        return torch.nn.functional.layer_norm(
            rows, rows.shape[-1:], self.shared[f"{name}.weight"], self.shared[f"{name}.bias"]
        )
