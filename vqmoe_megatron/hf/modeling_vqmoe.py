"""VQMoE language models for Hugging Face, in one file that needs torch and transformers 5 alone.

Written by ``vqmoe export --hf`` of vqmoe_megatron; ``AutoModelForCausalLM.from_pretrained(FOLDER,
trust_remote_code=True)`` loads it. For inference and evaluation: the discrete path and the code
memory are tables without gradient.

B sequences of S tokens, H hidden size, V vocabulary entries, N experts, F their hidden size, C code
slices of K codes, M rows per address, A addresses of a code memory, R = A M.

A layer is x + attention(norm(x)), then x + moe(norm(x)), with

    moe(x) = continuous(x)                       a router's k experts, weighed by probabilities
           | table[nearest code of x]            path=discrete: one output per code
           | p_c continuous(x) + p_d table[...]  path=dual, p of a gate
           | chosen experts by x, others by code path=filled, weighed by the router's probabilities
           + memory(x)                           rows by a token's codes and those before it
           + shared(x)                           an expert that sees every token
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

OUTPUT_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
CACHE_FIELD = "cache" if "cache" in OUTPUT_FIELDS else "past_key_values"  # by release
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class VQMoEConfig(PretrainedConfig):
    """Sizes and choices of a model; names are those of its recipe where there is one."""

    model_type = "vqmoe"

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 64,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 4,
        head_dim: int = 16,
        max_position_embeddings: int = 256,
        position_embedding_type: str = "rope",
        rotary_base: float = 10000.0,
        normalization: str = "LayerNorm",
        layernorm_epsilon: float = 1e-5,
        activation_func: str = "gelu",
        gated_linear_unit: bool = False,
        add_bias_linear: bool = True,
        add_qkv_bias: bool = False,
        ffn_hidden_size: int = 256,
        moe_layers: list[int] | None = None,  # numbers from 0; the others are dense
        num_moe_experts: int = 8,
        moe_ffn_hidden_size: int = 128,
        moe_router_topk: int = 1,
        moe_router_pre_softmax: bool = True,
        moe_router_dtype: str | None = "fp32",
        moe_shared_expert_intermediate_size: int | None = None,
        path: str = "continuous",  # continuous | discrete | dual | filled
        combine: str = "softmax",  # of path=dual: softmax | sigmoid
        quantizer: str = "euclidean",  # or product, residual, cosine, low_dim, fsq, lfq
        num_code_slices: int = 1,
        num_codes: int = 0,
        code_dim: int = 0,
        norms_sum_of_slices: bool = False,
        num_fill_experts: int | None = None,  # of path=filled; None: all
        threshold_routing: bool = False,
        memory_layers: list[int] | None = None,  # numbers from 0 that carry memory
        memory_codes: str = "tokens",
        memory_num_codes: int = 0,  # of hidden states
        memory_num_rows: int = 0,
        memory_max_order: int = 3,
        memory_num_context_codes: int = 0,
        memory_context_decay: float = 0.7,
        memory_context_dim: int = 0,
        memory_gate: str = "none",
        memory_vocab_size: int = 0,
        **kwargs,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.position_embedding_type = position_embedding_type
        self.rotary_base = rotary_base
        self.normalization = normalization
        self.layernorm_epsilon = layernorm_epsilon
        self.activation_func = activation_func
        self.gated_linear_unit = gated_linear_unit
        self.add_bias_linear = add_bias_linear
        self.add_qkv_bias = add_qkv_bias
        self.ffn_hidden_size = ffn_hidden_size
        self.moe_layers = list(range(num_hidden_layers)) if moe_layers is None else moe_layers
        self.num_moe_experts = num_moe_experts
        self.moe_ffn_hidden_size = moe_ffn_hidden_size
        self.moe_router_topk = moe_router_topk
        self.moe_router_pre_softmax = moe_router_pre_softmax
        self.moe_router_dtype = moe_router_dtype
        self.moe_shared_expert_intermediate_size = moe_shared_expert_intermediate_size
        self.path = path
        self.combine = combine
        self.quantizer = quantizer
        self.num_code_slices = num_code_slices
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.norms_sum_of_slices = norms_sum_of_slices
        self.num_fill_experts = num_fill_experts
        self.threshold_routing = threshold_routing
        self.memory_layers = [] if memory_layers is None else memory_layers
        self.memory_codes = memory_codes
        self.memory_num_codes = memory_num_codes
        self.memory_num_rows = memory_num_rows
        self.memory_max_order = memory_max_order
        self.memory_num_context_codes = memory_num_context_codes
        self.memory_context_decay = memory_context_decay
        self.memory_context_dim = memory_context_dim
        self.memory_gate = memory_gate
        self.memory_vocab_size = memory_vocab_size
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def memory_num_addresses(self) -> int:
        """A."""
        return self.memory_max_order + (2 if self.memory_num_context_codes else 0)


def new_norm(config: VQMoEConfig) -> nn.Module:
    """A norm of the model's kind."""
    if config.normalization == "RMSNorm":
        return nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
    return nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)


class FeedForward(nn.Module):
    """Two linear layers; gated, fc1 holds the gate's half first and then the other."""

    def __init__(self, config: VQMoEConfig, width: int, bias: bool) -> None:
        super().__init__()
        self.is_gated = config.gated_linear_unit
        self.activation = ACTIVATIONS[config.activation_func]
        self.fc1 = nn.Linear(config.hidden_size, width * (2 if self.is_gated else 1), bias=bias)
        self.fc2 = nn.Linear(width, config.hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` -> ``[..., H]``."""
        hidden = self.fc1(x)
        if self.is_gated:
            gate, up = hidden.chunk(2, dim=-1)
            return self.fc2(self.activation(gate) * up)
        return self.fc2(self.activation(hidden))


class Attention(nn.Module):
    """Causal attention; ``qkv_proj`` holds, group by group, its queries, its key and its value."""

    def __init__(self, config: VQMoEConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.num_groups = config.num_key_value_heads
        self.heads_per_group = config.num_attention_heads // self.num_groups
        width = config.num_attention_heads * config.head_dim
        has_bias = config.add_bias_linear or config.add_qkv_bias
        of_groups = self.num_groups * (self.heads_per_group + 2) * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, of_groups, bias=has_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.add_bias_linear)

    def forward(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor,
        cache: DynamicCache | None,
    ) -> torch.Tensor:
        """x ``[B, S, H]``; cos and sin ``[B, S, head_dim]`` each; mask ``[B, 1, S, T]``."""
        batch, length, _ = x.shape
        grouped = self.qkv_proj(x).view(
            batch, length, self.num_groups, self.heads_per_group + 2, self.head_dim
        )
        query = grouped[..., :-2, :].flatten(2, 3).transpose(1, 2)
        key, value = grouped[..., -2, :].transpose(1, 2), grouped[..., -1, :].transpose(1, 2)
        if rotation is not None:
            query, key = rotated(query, rotation), rotated(key, rotation)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        key, value = (part.repeat_interleave(self.heads_per_group, dim=1) for part in (key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def rotated(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """``[B, heads, S, D]``, halves turned against each other, in fp32."""
    cos, sin = (part.unsqueeze(1) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


class Experts(nn.ModuleList):
    """N experts by their global numbers, and Megatron's router, which one expert has not."""

    def __init__(self, config: VQMoEConfig) -> None:
        width, bias = config.moe_ffn_hidden_size, config.add_bias_linear
        super().__init__(FeedForward(config, width, bias) for _ in range(config.num_moe_experts))


class Router(nn.Module):
    """Softmax over all experts before the choice of k, or over the k chosen."""

    def __init__(self, config: VQMoEConfig) -> None:
        super().__init__()
        self.topk, self.is_before = config.moe_router_topk, config.moe_router_pre_softmax
        self.dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(config.moe_router_dtype)
        self.weight = nn.Parameter(torch.empty(config.num_moe_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.num_moe_experts))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[T, H]`` -> probabilities and experts ``[T, k]``."""
        logits = self.logits(x)
        if self.is_before:
            probs, experts = logits.softmax(dim=-1, dtype=torch.float32).topk(self.topk, dim=1)
        else:
            scores, experts = logits.topk(self.topk, dim=1)
            probs = scores.softmax(dim=-1, dtype=torch.float32)
        return probs.to(x.dtype), experts

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` -> ``[T, N]``."""
        dtype = self.dtype or x.dtype
        return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))

    def probabilities(self, x: torch.Tensor) -> torch.Tensor:
        """Of all experts: ``[T, H]`` -> fp32 (fp64) ``[T, N]``."""
        logits = self.logits(x)
        exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return logits.softmax(dim=-1, dtype=exact)


PROJECTED = ("low_dim", "fsq", "lfq")


class CodeTable(nn.Module):
    """The discrete path: the output of every code, found once when the model was exported."""

    def __init__(self, config: VQMoEConfig, num_rows: int) -> None:
        super().__init__()
        slices, codes, hidden = config.num_code_slices, config.num_codes, config.hidden_size
        self.kind, self.num_codes = config.quantizer, codes
        self.register_buffer("codes", torch.zeros(slices, codes, config.code_dim))
        self.register_buffer("table", torch.zeros(num_rows, hidden))
        if self.kind in PROJECTED:
            self.register_buffer("projection", torch.zeros(config.code_dim, hidden))
        self.output_norm = new_norm(config) if config.norms_sum_of_slices else nn.Identity()

    def prepared(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens where distances are taken: ``[T, H]`` -> fp32 ``[T, C, D]``; of residual codes
        ``[T, 1, H]``."""
        tokens = x.float()
        if self.kind in PROJECTED:
            tokens = tokens @ self.projection.t()
        if self.kind == "fsq":
            tokens = tokens.tanh()
        if self.kind == "residual":
            return tokens.unsqueeze(1)
        if self.kind == "cosine":
            tokens = F.normalize(tokens, dim=-1, eps=1e-12) * tokens.shape[-1] ** 0.5
        return tokens.view(x.shape[0], self.codes.shape[0], -1)

    def ids(self, tokens: torch.Tensor) -> torch.Tensor:
        """Prepared tokens -> codes int64 ``[T, C]``; residual codes of what earlier ones left."""
        if self.kind != "residual":
            return nearest(tokens, self.codes)
        found = []
        for codes in self.codes:
            found.append(nearest(tokens, codes.unsqueeze(0)))
            tokens = tokens - codes[found[-1]]
        return torch.cat(found, dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` -> ``[T, H]``."""
        slices = self.codes.shape[0]
        ids = self.ids(self.prepared(x))
        ids = ids + torch.arange(slices, device=ids.device) * self.num_codes
        rows = self.table[ids].sum(dim=1) * slices**-0.5
        return self.output_norm(rows.to(x.dtype))


def nearest(tokens: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """``[T, C, D]`` and ``[C, K, D]`` -> the nearest codes int64 ``[T, C]``; of two the first.

    Both as seen from the most central code: what all have in common would eat the digits that tell
    close codes apart.
    """
    middle = (codes - codes.mean(dim=1, keepdim=True)).square().sum(dim=-1).argmin(dim=1)
    centre = codes[torch.arange(codes.shape[0], device=codes.device), middle]  # [C, D]
    tokens, codes = tokens - centre, codes - centre.unsqueeze(1)
    distances = codes.square().sum(dim=-1) / 2 - torch.einsum("tcd,ckd->tck", tokens, codes)
    return distances.argmin(dim=-1)


class FilledTable(CodeTable):
    """path=filled: ``table`` holds every expert's answer to every code, ``[N K, H]``."""

    def __init__(self, config: VQMoEConfig) -> None:
        has_table = config.num_fill_experts != 0
        super().__init__(config, config.num_moe_experts * config.num_codes if has_table else 0)
        self.topk, self.num_fill = config.moe_router_topk, config.num_fill_experts
        self.has_threshold = config.threshold_routing
        if self.has_threshold:
            self.register_buffer("tau", torch.zeros(()))

    def forward(self, x: torch.Tensor, probs: torch.Tensor, experts: Experts) -> torch.Tensor:
        """x ``[T, H]`` and the router's probabilities ``[T, N]`` -> ``[T, H]``."""
        tokens = self.prepared(x)
        ids = nearest(tokens, self.codes)[:, 0]
        chosen = self._chosen(probs, (tokens[:, 0] - self.codes[0, ids]).square().mean(dim=1))
        y = torch.zeros_like(x, dtype=probs.dtype)
        for number, expert in enumerate(experts):
            seen = chosen[:, number].nonzero().flatten()
            if seen.numel():
                y.index_add_(0, seen, expert(x[seen]) * probs[seen, number].unsqueeze(1))
        if self.num_fill != 0:
            answers = ~chosen
            if self.num_fill is not None:
                answers = answers & likeliest(probs, self.num_fill)
            weights = probs * answers
            table = self.table.view(probs.shape[1], self.num_codes, -1).to(weights.dtype)
            for code in ids.unique().tolist():
                of_code = (ids == code).nonzero().flatten()
                y.index_add_(0, of_code, weights[of_code] @ table[:, code])
        return y.to(x.dtype)

    def _chosen(self, probs: torch.Tensor, mean_squares: torch.Tensor) -> torch.Tensor:
        """Which experts see the token itself: bool ``[T, N]``."""
        if not self.has_threshold:
            return likeliest(probs, self.topk)
        scores = probs * mean_squares.sqrt().unsqueeze(1)
        return torch.where(self.tau > 0, scores > self.tau, likeliest(probs, 1))


def likeliest(probs: torch.Tensor, k: int) -> torch.Tensor:
    """bool ``[T, N]``: the k largest of each row."""
    return torch.zeros_like(probs, dtype=torch.bool).scatter_(1, probs.topk(k).indices, True)


class Memory(nn.Module):
    """One layer's rows; with codes of hidden states, those, too."""

    def __init__(self, config: VQMoEConfig) -> None:
        super().__init__()
        hidden, num_rows = config.hidden_size, config.memory_num_rows
        self.config = config
        self.register_buffer("rows", torch.zeros(config.memory_num_addresses * num_rows, hidden))
        self.gate = nn.Linear(hidden, 1) if config.memory_gate == "token" else None
        if config.memory_codes == "hidden":
            self.register_buffer("codes", torch.zeros(1, config.memory_num_codes, hidden))

    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """x ``[T, H]`` and rows int64 ``[T, A]`` -> ``[T, H]``."""
        y = self.rows[rows].sum(dim=1).to(x.dtype)
        return y if self.gate is None else (y * self.gate(x).sigmoid()).to(x.dtype)


class MoE(nn.Module):
    """The mixture, what the codes say, and the memory; see the file's head."""

    def __init__(self, config: VQMoEConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        needs_experts = config.path != "discrete"
        self.experts = Experts(config) if needs_experts else None
        self.router = Router(config) if needs_experts and config.num_moe_experts > 1 else None
        self.discrete = None
        if config.path in ("discrete", "dual"):
            self.discrete = CodeTable(config, config.num_code_slices * config.num_codes)
        if config.path == "filled":
            self.discrete = FilledTable(config)
        if config.path == "dual":
            num_weights = 2 if config.combine == "softmax" else 1
            self.combine = nn.Linear(config.hidden_size, num_weights)
        self.memory = Memory(config) if layer in config.memory_layers else None
        width = config.moe_shared_expert_intermediate_size
        self.shared_expert = None if width is None else FeedForward(config, width, bias=False)

    def forward(self, x: torch.Tensor, rows_of: RowsOf) -> torch.Tensor:
        """``[B, S, H]`` -> ``[B, S, H]``."""
        shape, x = x.shape, x.flatten(0, 1)
        y = self._paths(x)
        if self.memory is not None:
            y = y + self.memory(x, rows_of(x, self.memory))
        if self.shared_expert is not None:
            y = y + self.shared_expert(x)
        return y.view(shape)

    def _paths(self, x: torch.Tensor) -> torch.Tensor:
        if self.experts is None:
            return self.discrete(x)
        if self.config.path == "filled":
            return self.discrete(x, self.router.probabilities(x), self.experts)
        y = self._continuous(x)
        if self.discrete is None:
            return y
        logits = self.combine(x).float()
        if self.config.combine == "sigmoid":
            return (y + logits.sigmoid() * self.discrete(x)).to(x.dtype)
        p = logits.softmax(dim=-1)
        return (p[:, :1] * y + p[:, 1:] * self.discrete(x)).to(x.dtype)

    def _continuous(self, x: torch.Tensor) -> torch.Tensor:
        if self.router is None:
            return self.experts[0](x)
        probs, chosen = self.router(x)
        y = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            tokens, slot = (chosen == number).nonzero(as_tuple=True)
            part = self.experts[number](x[tokens]) * probs[tokens, slot].unsqueeze(1)
            y.index_add_(0, tokens, part.to(y.dtype))
        return y


class Layer(nn.Module):
    """Attention and what comes behind it."""

    def __init__(self, config: VQMoEConfig, number: int) -> None:
        super().__init__()
        self.input_layernorm = new_norm(config)
        self.self_attn = Attention(config, number)
        self.post_attention_layernorm = new_norm(config)
        if number in config.moe_layers:
            self.mlp = MoE(config, number)
        else:
            self.mlp = FeedForward(config, config.ffn_hidden_size, config.add_bias_linear)

    def forward(self, x, rotation, mask, cache, rows_of):  # noqa: ANN001, ANN201
        """``[B, S, H]`` -> ``[B, S, H]``."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache)
        ready = self.post_attention_layernorm(x)
        return x + (self.mlp(ready, rows_of) if isinstance(self.mlp, MoE) else self.mlp(ready))


# Where a token's rows lie: hashes of its code and of those before it.
GOLDEN = -7046029254386353131
MIXERS = ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1))
LEAST_WEIGHT = 1e-4  # terms of a context's mean that weigh less are left out


def mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's hash of int64 numbers, of 63 bits."""
    for shift, factor in MIXERS:
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x & ((1 << 63) - 1)


def hashed(parts: list[torch.Tensor], num_rows: int, salt: int) -> torch.Tensor:
    """int64 tensors of one shape -> their hash together, in ``[0, num_rows)``."""
    x = torch.full_like(parts[0], salt)
    for part in parts:
        x = mix(x * GOLDEN + part)
    return x % num_rows


def row_ids(
    codes: torch.Tensor,
    before: torch.Tensor,
    num_rows: int,
    max_order: int,
    contexts: torch.Tensor | None,
) -> torch.Tensor:
    """Codes, tokens before each in its sequence, codes of contexts, int64 ``[B, S]`` each -> rows
    int64 ``[B, S, A]``."""
    addresses, chain = [codes % num_rows], [codes + 1]
    for order in range(2, max_order + 1):
        moved = F.pad(codes + 1, (order - 1, 0))[:, : codes.shape[1]]
        chain.append(torch.where(before >= order - 1, moved, torch.zeros_like(moved)))
        addresses.append(hashed(chain, num_rows, order))
    if contexts is not None:
        addresses += [contexts % num_rows, hashed([contexts, codes], num_rows, 0)]
    count = len(addresses)
    turned = [a * count + (mix(a) + i) % count for i, a in enumerate(addresses)]
    return torch.stack(turned, dim=-1)


class MemoryCodes(nn.Module):
    """What a token's code is, and its context's; the same for all layers."""

    def __init__(self, config: VQMoEConfig) -> None:
        super().__init__()
        self.config = config
        size, width = config.memory_vocab_size, config.memory_context_dim
        self.register_buffer("code_of_token", torch.zeros(size, dtype=torch.int64))
        if config.memory_num_context_codes:
            self.register_buffer("context_table", torch.zeros(size, width))
            codes = torch.zeros(config.memory_num_context_codes, width)
            self.register_buffer("context_codes", codes)

    def forward(self, token_ids: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Token ids and how many lie before each, ``[B, S]`` -> rows ``[B, S, A]``."""
        config, contexts = self.config, None
        if config.memory_num_context_codes:
            means = self._means(self.context_table[token_ids], before)
            flat = means.flatten(0, 1).unsqueeze(1)
            contexts = nearest(flat, self.context_codes.unsqueeze(0)).view_as(token_ids)
        codes = self.code_of_token[token_ids]
        return row_ids(codes, before, config.memory_num_rows, config.memory_max_order, contexts)

    def _means(self, vectors: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        decay = self.config.memory_context_decay
        means, distance = vectors * (1.0 - decay), 1
        if decay <= LEAST_WEIGHT:
            return means
        for _ in range(math.ceil(math.log2(math.log(LEAST_WEIGHT) / math.log(decay) + 1))):
            earlier = F.pad(means, (0, 0, distance, 0))[:, : means.shape[1]]
            inside = (before >= distance).unsqueeze(-1)
            means = (
                means + torch.where(inside, earlier, torch.zeros_like(earlier)) * decay**distance
            )
            distance *= 2
        return means


class RowsOf:
    """The rows that the new tokens of a call read; those before them are known by their ids."""

    def __init__(
        self,
        codes: MemoryCodes | None,
        token_ids: torch.Tensor,
        before: torch.Tensor,
        num_new: int,
    ) -> None:
        self.before, self.num_new = before, num_new
        self.rows = None
        if codes is not None:
            self.rows = codes(token_ids, before)[:, -num_new:].flatten(0, 1)

    def __call__(self, x: torch.Tensor, memory: Memory) -> torch.Tensor:
        """int64 ``[T, A]`` for hidden states ``[T, H]``."""
        if self.rows is not None:
            return self.rows
        config = memory.config
        codes = nearest(x.float().unsqueeze(1), memory.codes).view(-1, self.num_new)
        order = config.memory_max_order
        return row_ids(codes, self.before, config.memory_num_rows, order, None).flatten(0, 1)


class VQMoEPreTrainedModel(PreTrainedModel):
    """Loading and saving."""

    config_class = VQMoEConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["discrete", "memory", "memory_codes"]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, Router):
            nn.init.normal_(module.weight, std=0.02)


class VQMoEModel(VQMoEPreTrainedModel):
    """Token ids to hidden states."""

    def __init__(self, config: VQMoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.position_embedding_type == "learned_absolute":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        of_tokens = bool(config.memory_layers) and config.memory_codes != "hidden"
        self.memory_codes = MemoryCodes(config) if of_tokens else None
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_hidden_layers))
        self.norm = new_norm(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: DynamicCache | None = None,
        preceding_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[B, S]`` -> ``[B, S, H]``.

        Args:
            input_ids: new tokens.
            attention_mask: 1 for tokens and 0 for padding on the left, ``[B, tokens so far]``.
            position_ids: of the new tokens; found from the mask.
            cache: of keys and values; the new ones are added.
            preceding_ids: ids of the tokens in the cache, which a code memory needs.
        """
        batch, length = input_ids.shape
        past = 0 if cache is None else cache.get_seq_length()
        seen = past + length
        if attention_mask is None:
            attention_mask = input_ids.new_ones(batch, seen)
        real = attention_mask[:, -seen:].bool()
        places = (real.long().cumsum(dim=1) - 1).clamp(min=0)
        if position_ids is None:
            position_ids = places[:, past:]
        causal = torch.ones(length, seen, dtype=torch.bool, device=real.device).tril(past)
        mask = causal & real[:, None, None, :]
        mask = mask | ~mask.any(dim=-1, keepdim=True)  # rows of padding see all: no NaN

        x = self.embed_tokens(input_ids.masked_fill(~real[:, past:], 0))  # padding: any number
        rotation = None
        if self.embed_positions is not None:
            x = x + self.embed_positions(position_ids)
        else:
            rotation = self._rotation(position_ids)
        rows_of = self._rows_of(input_ids, preceding_ids, real, places, past)
        for layer in self.layers:
            x = layer(x, rotation, mask, cache, rows_of)
        return self.norm(x)

    def _rotation(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = torch.arange(0, self.config.head_dim, 2, device=position_ids.device).float()
        speeds = 1.0 / self.config.rotary_base ** (half / self.config.head_dim)
        angles = position_ids.unsqueeze(-1).float() * speeds
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    def _rows_of(
        self,
        input_ids: torch.Tensor,
        preceding_ids: torch.Tensor | None,
        real: torch.Tensor,
        places: torch.Tensor,
        past: int,
    ) -> RowsOf | None:
        if not self.config.memory_layers:
            return None
        num_new = input_ids.shape[1]
        if past and self.memory_codes is None:
            raise ValueError(
                "codes of hidden states of earlier tokens are not in a cache of keys and values: "
                "generate with use_cache=False"
            )
        if past and (preceding_ids is None or preceding_ids.shape[1] != past):
            raise ValueError(
                f"the cache holds {past} tokens, and a code memory finds rows by their ids: pass "
                "them as preceding_ids, as generate() does"
            )
        token_ids = input_ids
        if past:
            token_ids = torch.cat([preceding_ids, input_ids], dim=1)
        return RowsOf(self.memory_codes, token_ids.masked_fill(~real, 0), places, num_new)


class VQMoEForCausalLM(VQMoEPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: VQMoEConfig) -> None:
        super().__init__(config)
        self.model = VQMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: DynamicCache | None = None,
        past_key_values: DynamicCache | None = None,
        preceding_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, S, V]`` of ids ``[B, S]``, and with ``labels`` the mean loss in nats."""
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        hidden = self.model(input_ids, attention_mask, position_ids, cache, preceding_ids)
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            shifted = logits[:, :-1].flatten(0, 1).float()
            loss = F.cross_entropy(shifted, labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_FIELD: cache})

    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):  # noqa: ANN001, ANN201
        """As always, and the ids of the tokens that are in the cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if self.model.memory_codes is not None and inputs.get("input_ids") is not None:
            num_new = inputs["input_ids"].shape[1]
            inputs["preceding_ids"] = input_ids[:, : input_ids.shape[1] - num_new]
        return inputs
