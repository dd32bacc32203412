"""The whole VQMoE layer, slow and readable: what every fast path must equal, forward and backward.

T tokens, H hidden size, N experts, F expert hidden size, k selected experts, C code slices, K codes
per slice, D = H / C slice width.

Written from the method's definitions (arXiv 2411.19402, section 3): Python loops over tokens and
experts, no dispatch, no grouping, no ranks. Tests compare output and every gradient by name;
benchmarks pass this gate before they time anything. For one token x:

1. code of slice c: argmin_k |x_c - v_ck|^2, ties to the lowest index;
2. expert of code (c, k): ``expert_of_row[c * K + k]``, by default (c * K + k) mod N;
3. expert input u_c: the code or its learned vector with a straight-through gradient, a blend, or
   the token;
4. y_d = norm(sum_c f_e(norm(u_c)) / sqrt(C));
5. y_c = sum over the k selected experts of p_e f_e(x), the same experts;
   one expert has no router, and p_e = 1;
6. y = p_0 y_c + p_1 y_d, p = softmax(W x + b), or y_c + sigmoid(w x + b) y_d;
7. a shared expert f_s, where there is one, is added: y + f_s(x);
   path=filled has no 2 to 6, but :func:`filled_output`;
8. VQ loss = coeff * (mean |sg(x) - v|^2 + commitment * mean |x - sg(v)|^2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.vq.fill_oracle import filled_output
from vqmoe_megatron.vq.search_oracle import (
    PROJECTED,
    code_vectors,
    entropy_loss,
    errors,
    lifted,
    nearest,
    prepare,
    whole,
)

ROUTER_SOFTMAX_DTYPE = torch.float32  # Megatron takes it in fp32 whatever the dtype of the logits


@dataclass(frozen=True)
class OracleResult:
    """What the layer computes for T tokens."""

    output: torch.Tensor  # [T, H]
    vq_loss: torch.Tensor  # scalar, all coefficients applied; 0 without a discrete path
    commitment_loss: torch.Tensor  # scalar, mean |x - sg(v)|^2 over T * H elements
    codebook_loss: torch.Tensor  # scalar, mean |sg(x) - v|^2 over T * H elements
    codes: torch.Tensor | None  # int64 [T, C]; None without a discrete path
    experts: torch.Tensor | None  # int64 [T, C], the experts of those codes
    chosen: tuple[list[int], ...] = ()  # path=filled: the experts that saw each token


def vqmoe_oracle(
    x: torch.Tensor,
    parameters: Mapping[str, torch.Tensor],
    vq: VQConfig,
    *,
    num_experts: int,
    topk: int = 1,
    pre_softmax: bool = True,
    activation: Callable[[torch.Tensor], torch.Tensor] = torch.nn.functional.gelu,
    gated: bool = False,
    normalization: str = "LayerNorm",
    norm_eps: float = 1e-5,
    replicas: Sequence[int] | None = None,
    tau: float | None = None,
) -> OracleResult:
    """Evaluate the layer token by token.

    Args:
        x: ``[T, H]`` hidden states, T at least 1; all tokens of all ranks.
        parameters: the layer's tensors by the names they have in ``VQMoELayer.state_dict()``,
            experts of all ranks stacked: ``router.weight [N, H]``, ``router.bias [N]``,
            ``experts.weight1 [N, F or 2F, H]``, ``experts.bias1``, ``experts.weight2 [N, H, F]``,
            ``experts.bias2``, ``assigner.codebook.codes [C, K, D]``,
            ``assigner.code_map.expert_of_row`` int64 ``[C * K]`` (absent: the mod rule),
            ``shared_experts.linear_fc1.weight [F or 2F, H]``,
            ``shared_experts.linear_fc2.weight [H, F]`` (absent: no shared expert; its F is its
            own), ``assigner.codebook.projection [D, H]`` (quantizer: low_dim, fsq, lfq),
            ``assigner.codebook.scale [1, 1]`` (learn_code_scale),
            ``assigner.codebook.usage [1, K]`` (quantizer: lfq),
            ``code_inputs.vectors [C, K, H]`` (code_input: learned), ``fill_rows.values [N, K, H]``
            (fill_values: direct),
            ``gate.linear.weight``, ``gate.linear.bias``, ``input_norm.weight``,
            ``output_norm.weight`` and their biases. Absent biases are zero. Gradients flow into
            those that require them.
        vq: the layer's settings.
        num_experts: N.
        topk: k of the continuous path.
        pre_softmax: softmax over all N logits before the selection, else over the k selected.
        activation: of the experts.
        gated: the first half of fc1 is activated and multiplies the second half.
        normalization: LayerNorm or RMSNorm.
        norm_eps: of the norms.
        replicas: the data-parallel replica that holds each of the T tokens, which
            straight_through=group pools its means over; None: one holds all.
        tau: of vq.threshold_routing; None: not set yet.

    Returns:
        The result, in the dtype of ``x`` (the router's softmax is fp32, as Megatron's). The balance
        loss is not part of it: it belongs to Megatron's router.

    No communication.
    """
    experts = OracleExperts(parameters, activation, gated)
    norms = _Norms(parameters, vq, normalization, norm_eps)
    prepared = [prepare(token, parameters, vq) for token in x]
    pools = _Pools(prepared, parameters, vq, replicas or [0] * len(prepared))
    outputs, losses, all_codes, all_experts, chosen = [], [], [], [], []
    for t, (token, ready) in enumerate(zip(x, prepared, strict=True)):
        y_continuous = y_discrete = None
        if vq.path == "filled":
            codes, vectors = nearest(ready, code_vectors(parameters, vq), vq)
            rows = parameters.get("fill_rows.values")
            y, experts_of_token = filled_output(
                token,
                _logits(token, parameters),
                experts,
                lifted(vectors[0].detach(), parameters, vq),
                float((ready - vectors[0]).detach().square().mean().sqrt()),
                None if rows is None else rows[:, codes[0]],
                vq,
                topk,
                tau,
            )
            outputs.append(y)
            losses.append(errors(ready, vectors, vq))
            all_codes.append(codes)
            chosen.append(experts_of_token)
            continue
        if vq.path != "discrete":
            y_continuous = _continuous(token, parameters, experts, topk, pre_softmax)
        if vq.path != "continuous":
            codes, vectors = nearest(ready, code_vectors(parameters, vq), vq)
            owners = [_owner(c, k, parameters, vq, num_experts) for c, k in enumerate(codes)]
            is_raw = vq.expert_input == "token" or vq.quantizer in PROJECTED
            source = token if is_raw else ready
            rows = [c * vq.num_codes + k for c, k in enumerate(codes)]
            if vq.expert_input == "code":
                passing = [pools.passing(t, c) for c in range(len(codes))]
                inputs = _code_inputs(vectors, rows, passing, parameters, vq)
            else:
                code = lifted(whole(vectors, vq).detach(), parameters, vq)
                inputs = [_mixed_input(source, code, vq)] * len(codes)
            y_discrete = _discrete(
                lifted(ready, parameters, vq), inputs, owners, vq, experts, norms
            )
            losses.append(errors(ready, vectors, vq))
            all_codes.append(codes)
            all_experts.append(owners)
        y = _mix(token, y_continuous, y_discrete, parameters, vq)
        outputs.append(y + experts.shared(token) if experts.has_shared else y)

    commitment = codebook = x.new_zeros(())
    extra: torch.Tensor | float = 0.0
    if losses:
        commitment, codebook = (torch.stack(one).mean() for one in zip(*losses, strict=True))
        if vq.quantizer == "lfq":
            usage = parameters["assigner.codebook.usage"][0]
            extra = torch.stack([entropy_loss(r, usage, vq) for r in prepared]).mean()
    return OracleResult(
        output=torch.stack(outputs),
        vq_loss=vq.vq_loss_coeff * (codebook + vq.commitment_coeff * commitment) + extra,
        commitment_loss=commitment,
        codebook_loss=codebook,
        codes=torch.tensor(all_codes) if all_codes else None,
        experts=torch.tensor(all_experts) if all_experts else None,
        chosen=tuple(chosen),
    )


class OracleExperts:
    """f_e: the N expert MLPs, one call per row."""

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        activation: Callable[[torch.Tensor], torch.Tensor],
        gated: bool,
    ) -> None:
        self.parameters = parameters
        self.activation = activation
        self.gated = gated

    def __call__(self, expert: int, row: torch.Tensor) -> torch.Tensor:
        """row [H] -> [H]."""
        return self._linear(expert, self._activate(self._linear(expert, row, "1")), "2")

    @property
    def has_shared(self) -> bool:
        """Whether there is a shared expert."""
        return "shared_experts.linear_fc1.weight" in self.parameters

    def shared(self, token: torch.Tensor) -> torch.Tensor:
        """f_s: token [H] -> [H]."""
        fc1, fc2 = (
            self.parameters[f"shared_experts.linear_{name}.weight"] for name in ("fc1", "fc2")
        )
        return fc2 @ self._activate(fc1 @ token)

    def _activate(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.gated:
            return self.activation(hidden)
        gate, up = hidden.chunk(2)
        return self.activation(gate) * up

    def _linear(self, expert: int, row: torch.Tensor, number: str) -> torch.Tensor:
        y = self.parameters[f"experts.weight{number}"][expert] @ row
        bias = self.parameters.get(f"experts.bias{number}")
        return y if bias is None else y + bias[expert]


class _Norms:
    """The norms around the experts of the discrete path: none, two, or one module used twice."""

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        vq: VQConfig,
        normalization: str,
        eps: float,
    ) -> None:
        self.parameters = parameters
        self.kind = vq.norm
        self.normalization = normalization
        self.eps = eps

    def before(self, u: torch.Tensor) -> torch.Tensor:
        """Norm of an expert input [H]."""
        return u if self.kind == "none" else self._norm("input_norm", u)

    def after(self, y: torch.Tensor) -> torch.Tensor:
        """Norm of the discrete output [H]."""
        if self.kind == "none":
            return y
        return self._norm("output_norm" if self.kind == "separate" else "input_norm", y)

    def _norm(self, name: str, v: torch.Tensor) -> torch.Tensor:
        if self.normalization == "LayerNorm":
            v = v - v.mean()
        v = v / (v.square().mean() + self.eps).sqrt() * self.parameters[f"{name}.weight"]
        bias = self.parameters.get(f"{name}.bias")
        return v if bias is None else v + bias


def _owner(
    code_slice: int,
    code: int,
    parameters: Mapping[str, torch.Tensor],
    vq: VQConfig,
    num_experts: int,
) -> int:
    """The expert of one code."""
    row = code_slice * vq.num_codes + code
    expert_of_row = parameters.get("assigner.code_map.expert_of_row")
    return row % num_experts if expert_of_row is None else int(expert_of_row[row])


def _logits(token: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[N] of the router."""
    logits = parameters["router.weight"] @ token
    return logits + parameters["router.bias"] if "router.bias" in parameters else logits


def _continuous(
    token: torch.Tensor,
    parameters: Mapping[str, torch.Tensor],
    experts: OracleExperts,
    topk: int,
    pre_softmax: bool,
) -> torch.Tensor:
    """The ordinary sparse mixture of experts, or one dense expert: token [H] -> [H]."""
    if "router.weight" not in parameters:
        return experts(0, token)
    logits = _logits(token, parameters)
    selected = logits.topk(topk).indices
    scores = logits if pre_softmax else logits[selected]
    weights = scores.softmax(dim=0, dtype=ROUTER_SOFTMAX_DTYPE).to(logits.dtype)
    weights = weights[selected] if pre_softmax else weights
    parts = [
        weight * experts(expert, token)
        for weight, expert in zip(weights, selected.tolist(), strict=True)
    ]
    return torch.stack(parts).sum(dim=0)


class _Pools:
    """What of a token passes its gradient to the expert input of a code row: value zero."""

    def __init__(
        self,
        prepared: list[torch.Tensor],
        parameters: Mapping[str, torch.Tensor],
        vq: VQConfig,
        replicas: Sequence[int],
    ) -> None:
        self.mode = vq.straight_through
        self.zeros = [ready - ready.detach() for ready in prepared]  # gradient one, value zero
        self.cell_of: list[list[tuple[int, int, int]]] = []  # of token and slice
        self.members: dict[tuple[int, int, int], list[int]] = {}
        if not vq.has_discrete_path or self.mode != "group":
            return
        for t, ready in enumerate(prepared):
            codes, _ = nearest(ready, code_vectors(parameters, vq), vq)
            self.cell_of.append([(replicas[t], c, k) for c, k in enumerate(codes)])
            for cell in self.cell_of[t]:
                self.members.setdefault(cell, []).append(t)

    def passing(self, token: int, code_slice: int) -> torch.Tensor:
        """Zero [H], whose gradient goes to the token, the mean of its cell, or nowhere."""
        if self.mode == "token":
            return self.zeros[token]
        if self.mode != "group":
            return self.zeros[token].detach()
        members = self.members[self.cell_of[token][code_slice]]
        # Each member passes to every member's token 1 / n of its gradient.
        return torch.stack([self.zeros[t] for t in members]).mean(dim=0)


def _code_inputs(
    vectors: list[torch.Tensor],
    rows: list[int],
    passing: list[torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    vq: VQConfig,
) -> list[torch.Tensor]:
    """One token's C code rows [H]: its code vectors in their places, or learned vectors."""
    if vq.code_input == "learned":
        learned = parameters["code_inputs.vectors"].flatten(0, 1)
        return [
            learned[row] + lifted(zero, parameters, vq)
            for row, zero in zip(rows, passing, strict=True)
        ]
    if vq.quantizer == "residual":  # every code over the full width
        return [v.detach() + zero for v, zero in zip(vectors, passing, strict=True)]
    v = torch.cat(vectors).detach()  # the task never moves the codebook
    width = v.numel() // len(rows)
    inputs = []
    for c, zero in enumerate(passing):
        place = torch.zeros_like(v)
        place[c * width : (c + 1) * width] = 1.0
        inputs.append(lifted((v + zero) * place, parameters, vq))
    return inputs


def _mixed_input(token: torch.Tensor, v: torch.Tensor, vq: VQConfig) -> torch.Tensor:
    """An expert input [H] that holds something of the token."""
    rate = vq.contribution_rate
    if vq.expert_input == "blend":
        return (1 - rate) * token + rate * (v - token).detach()
    if vq.expert_input == "blend_convex":
        return (1 - rate) * token + rate * (token + (v - token).detach())
    return token


def _discrete(
    token: torch.Tensor,
    inputs: list[torch.Tensor],
    owners: list[int],
    vq: VQConfig,
    experts: OracleExperts,
    norms: _Norms,
) -> torch.Tensor:
    """One token [H] (prepared and lifted), its C expert inputs [H] -> [H]."""
    y = torch.zeros_like(token)
    for row, expert in zip(inputs, owners, strict=True):
        y = y + experts(expert, norms.before(row)) / len(owners) ** 0.5
    y = norms.after(y)
    if vq.expert_input == "code" and vq.straight_through == "identity":
        y = y + (token - token.detach())
    return y


def _mix(
    token: torch.Tensor,
    y_continuous: torch.Tensor | None,
    y_discrete: torch.Tensor | None,
    parameters: Mapping[str, torch.Tensor],
    vq: VQConfig,
) -> torch.Tensor:
    """The combine gate, or the only path there is: [H]."""
    if y_discrete is None:
        return y_continuous
    if y_continuous is None:
        return y_discrete
    logits = parameters["gate.linear.weight"] @ token + parameters["gate.linear.bias"]
    if vq.combine == "sigmoid":
        return y_continuous + logits.sigmoid() * y_discrete
    p_continuous, p_discrete = logits.softmax(dim=0)
    return p_continuous * y_continuous + p_discrete * y_discrete
