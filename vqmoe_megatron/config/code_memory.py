"""Settings of the code memory: learned rows that a token reads by codes, its own and earlier ones.

A addresses per token, M rows per address, N experts. Row ``r`` of a layer's A * M rows belongs to
expert ``r mod N``, as a code does.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqmoe_megatron.config.checks import check_choice, check_settings

LEGAL_MEMORY_VALUES: dict[str, tuple[str, ...]] = {
    "codes": ("embedding", "hidden", "tokens", "random", "frozen_random"),
    "values": ("direct", "experts"),
    "gate": ("none", "token"),
    "exchange": ("auto", "rows", "table"),
}
OF_EMBEDDINGS = ("embedding", "random")  # codes that follow the embedding until they are frozen
STEPS_TO_FIRST_CODES = 2  # the first step's end only counts tokens
STEPS_TO_FIRST_CONTEXTS = 3  # found at the second's end, of the first table; sent at the third's
CONTEXT_ADDRESSES = 2  # the context's code alone, and paired with the token's


@dataclass(frozen=True)
class CodeMemoryConfig:
    """Code memory beside a layer's other paths: y = y_experts + sum over addresses V[row].

    ``codes`` says what a token's code is: of its embedding (one codebook of the model, over the
    vocabulary), of the layer's hidden state, the token id itself, the nearest of random vectors, or
    a random number of the token id. Ids did best wherever they were compared, with rows at five
    times the learning rate (docs/experiments.md), so those are the defaults.
    """

    num_rows: int = 0  # M, of each address in each layer that carries memory; 0: no code memory
    codes: str = "tokens"
    num_codes: int = 256  # K, of every kind but tokens, which are their own codes
    max_order: int = 3  # addresses of 1 to so many successive codes
    num_context_codes: int = 0  # of embeddings' decayed mean (codes=embedding); 2 more addresses
    context_decay: float = 0.7  # weight of the token before, and so on
    context_dim: int = 32  # of the random projection in which contexts are compared
    freeze_after_steps: int | None = 200  # from then on codes stay; null: never
    layers: list[int] | None = None  # that carry memory, from 1; null: every layer with experts
    values: str = "direct"  # direct: learned rows; experts: the owner's output on a learned input
    gate: str = "none"  # token: a sigmoid of the token weighs what it read
    lr_mult: float = 5.0  # learning rate of the rows, in units of optimizer.lr
    exchange: str = "auto"  # rows: those asked for travel; table: all are gathered; auto: the less

    def __post_init__(self) -> None:
        check_settings("code_memory", self)
        for name, legal in LEGAL_MEMORY_VALUES.items():
            check_choice("code_memory", name, getattr(self, name), legal)
        if self.num_context_codes and self.codes != "embedding":
            raise ValueError(
                f"code_memory.num_context_codes={self.num_context_codes} with code_memory.codes="
                f"{self.codes}: contexts are means of embeddings; use codes=embedding, or 0"
            )
        if self.is_on and self.codes == "tokens" and self.num_codes != CodeMemoryConfig.num_codes:
            raise ValueError(
                f"code_memory.num_codes={self.num_codes} with code_memory.codes=tokens: every "
                "token id is a code of its own, so no number of codes is used; use "
                f"codes=embedding for {self.num_codes} learned codes, or leave num_codes at "
                f"{CodeMemoryConfig.num_codes}"
            )
        limit = self.freeze_after_steps
        if limit and self.num_context_codes and limit < STEPS_TO_FIRST_CONTEXTS:
            raise ValueError(
                f"code_memory.freeze_after_steps={limit} with code_memory.num_context_codes="
                f"{self.num_context_codes}: the codes of contexts are there after step "
                f"{STEPS_TO_FIRST_CONTEXTS}; use at least {STEPS_TO_FIRST_CONTEXTS}, null for "
                "codes that never freeze, or 0 for one code for all contexts"
            )
        if limit is not None and 0 < limit < STEPS_TO_FIRST_CODES and self.codes in OF_EMBEDDINGS:
            raise ValueError(
                f"code_memory.freeze_after_steps={limit} with code_memory.codes={self.codes}: "
                f"codes are found at the end of step {STEPS_TO_FIRST_CODES}, of counted tokens; "
                f"use at least {STEPS_TO_FIRST_CODES}, null for codes that never freeze, or 0 for "
                "the number of an entry mod num_codes"
            )
        if self.layers is not None and (
            not self.layers or sorted(set(self.layers)) != self.layers or self.layers[0] < 1
        ):
            raise ValueError(
                f"code_memory.layers={self.layers} must be layer numbers from 1 in rising order, "
                "for instance [1, 3]; null means every layer with experts"
            )

    @property
    def is_on(self) -> bool:
        """Whether there is a code memory."""
        return self.num_rows > 0

    @property
    def in_effect(self) -> CodeMemoryConfig:
        """These settings, or the defaults where there is no code memory: then none has an effect.

        For comparisons with a stored recipe, which holds every key, of its release's defaults.
        """
        return self if self.is_on else CodeMemoryConfig()

    @property
    def num_addresses(self) -> int:
        """A."""
        return self.max_order + (CONTEXT_ADDRESSES if self.num_context_codes else 0)

    @property
    def address_names(self) -> tuple[str, ...]:
        """Of the A addresses, in their order; by the number of successive codes."""
        orders = tuple(f"order {order}" for order in range(1, self.max_order + 1))
        return orders + (("context", "context and code") if self.num_context_codes else ())

    @property
    def rows_per_layer(self) -> int:
        """A * M."""
        return self.num_addresses * self.num_rows

    def groups_entries(self, vocab_size: int) -> bool:
        """Whether a code stands for several vocabulary entries, brought together by embedding.

        With a code for every entry nothing is left to learn: entries are their own codes.
        """
        return self.codes in OF_EMBEDDINGS and self.num_codes < vocab_size

    def moves(self, vocab_size: int) -> bool:
        """Whether codes are found anew once per step, of tokens or contexts, until the freeze."""
        return self.groups_entries(vocab_size) or self.num_context_codes > 0

    def carries(self, layer_number: int) -> bool:
        """Whether the layer of this number (from 1) has memory, if it has experts."""
        return self.is_on and (self.layers is None or layer_number in self.layers)

    def check_model(
        self, num_layers: int, num_experts: int, num_shards: int = 1, moe_layer_freq: int = 1
    ) -> None:
        """Raise ``ValueError`` for what the model's sizes rule out.

        ``num_shards`` is expert_tensor_parallel_size: an expert's rows are cut over its ranks.
        """
        if not self.is_on:
            return
        if self.num_rows % (num_experts * num_shards):
            raise ValueError(
                "code_memory.num_rows % (num_moe_experts * expert_tensor_parallel_size) != 0: "
                f"{self.num_rows} % ({num_experts} * {num_shards}) = "
                f"{self.num_rows % (num_experts * num_shards)}; ranks hold equally many rows, so "
                "use a multiple"
            )
        if self.values == "experts" and num_shards > 1:
            raise ValueError(
                "code_memory.values=experts with expert_tensor_parallel_size="
                f"{num_shards}: a row would need every shard of its expert; use values=direct, or "
                "expert_tensor_parallel_size=1"
            )
        if self.layers is not None and self.layers[-1] > num_layers:
            raise ValueError(
                f"code_memory.layers={self.layers}: the model has num_layers={num_layers}; name "
                "layers up to that, or null for all that have experts"
            )
        dense = [number for number in self.layers or () if (number - 1) % moe_layer_freq]
        if dense:
            raise ValueError(
                f"code_memory.layers={self.layers}: with moe_layer_freq={moe_layer_freq} layers "
                f"{dense} have no experts, which would own their rows; layer 1 and then every "
                "moe_layer_freq-th have"
            )

    @property
    def in_words(self) -> str:
        """What the memory is; one line for the user."""
        if not self.is_on:
            return "no code memory (code_memory.num_rows=0)"
        what = {
            "embedding": f"{self.num_codes} codes of the embedding",
            "hidden": f"{self.num_codes} codes of hidden states",
            "tokens": "token ids",
            "random": f"{self.num_codes} random codes",
            "frozen_random": f"{self.num_codes} frozen random codes",
        }[self.codes]
        if self.num_context_codes:
            what += f" and {self.num_context_codes} of its context"
        where = "every layer with experts" if self.layers is None else f"layers {self.layers}"
        return (
            f"code memory on {what}: {self.num_addresses} addresses x {self.num_rows} rows in "
            f"{where}, row r at expert r mod N"
        )
