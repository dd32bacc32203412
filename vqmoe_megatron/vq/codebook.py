"""The codebook: quantise tokens, record what the step saw, apply the step's update.

T tokens, H hidden size, C code slices, K codes per slice, D = H / C (``vq.code_dim`` for low_dim,
fsq and lfq; H for residual, whose slices are depths).

1. ``prepare`` brings tokens into the codebook's space, which a quantizer (``quantizers``) defines
   by overriding what is under 1 and 2 below.
2. ``search`` finds the nearest codes, int64 [T, C]; ``lookup`` reads their vectors, [T, H].
3. ``record`` adds a microbatch to the step's accumulators. It is called from the backward pass, so
   evaluation never reaches it and recomputed forwards are counted once.
4. Once per step the caller reduces ``step_statistics`` over the ranks that saw different tokens and
   hands the result to ``apply_step``. This file never communicates.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vqmoe_megatron import registry
from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.vq.code_hold import CodeHold
from vqmoe_megatron.vq.code_usage import RecentUsage, code_perplexity
from vqmoe_megatron.vq.codebook_init import data_codes, kmeans_codes, uniform_codes
from vqmoe_megatron.vq.codebook_update import (
    CodebookState,
    StepStatistics,
    ema_update,
    reanchor,
    update_usage,
)
from vqmoe_megatron.vq.host_draws import StepsTaken
from vqmoe_megatron.vq.keeps_float32 import KeepsFloat32
from vqmoe_megatron.vq.losses import look_up_codes, quantization_losses
from vqmoe_megatron.vq.revival import error_order, random_order, revive_dead_codes
from vqmoe_megatron.vq.search import nearest_code
from vqmoe_megatron.vq.segment_sum import segment_sum

NUM_PROBES = 256  # tokens kept from step to step to measure how many change their code


class Codebook(KeepsFloat32):
    """Code vectors, their moving statistics, and the rules that move them; of every quantizer.

    ``codes`` is fp32 whatever the model's dtype: codebook updates are far below bf16 resolution.
    ``seed`` decides every random choice and must be equal on all replicas of the layer.

    Raises:
        ValueError: when H does not divide by C.
    """

    takes: frozenset[str] = frozenset()  # of a package's own: code_dim, num_code_slices
    is_projected = False  # whether its space has another width than the hidden vectors
    is_sliced = True  # C vectors of a token stand side by side; else they are added
    search_is_nearest = False  # whether a search of its own finds the nearest of code_vectors

    usage: torch.Tensor  # fp32 [C, K], EMA of the fraction of tokens per code
    ema_sum: torch.Tensor  # fp32 [C, K, D], only for codebook_update=ema
    initialized: torch.Tensor  # bool scalar; uniform codes count as initialised
    num_steps: torch.Tensor  # int64 scalar, steps applied; seeds revival, decides on freezing
    step_count: torch.Tensor  # fp32 [C, K], this step's tokens per code
    step_total: torch.Tensor  # fp32 [C, K, D], this step's token sums (ema)
    probes: torch.Tensor  # fp32 [M, C, D], tokens kept to measure assignment changes

    def __init__(self, vq: VQConfig, hidden_size: int, seed: int) -> None:
        super().__init__()
        if self.is_sliced and hidden_size % vq.num_code_slices:
            raise ValueError(
                f"hidden_size % num_code_slices != 0: {hidden_size} % {vq.num_code_slices}"
            )
        self.vq = vq
        self.seed = seed
        self.num_slices = vq.num_code_slices
        self.num_codes = vq.num_codes
        num_side_by_side = vq.num_code_slices if self.is_sliced else 1
        self.width = vq.code_dim or hidden_size // num_side_by_side
        shape = (self.num_slices, self.num_codes, self.width)
        trained = vq.codebook_update in ("gradient", "reanchor") and not vq.freeze_codebook
        codes = self.draw_codes(seed)
        self.codes = torch.nn.Parameter(codes, requires_grad=trained)
        uniform = torch.full(shape[:2], 1.0 / self.num_codes)
        self.register_buffer("usage", uniform)
        self.hidden_size = hidden_size
        for name, constant in self.draw_constants(seed).items():
            if vq.train_projection:
                trained_constant = torch.nn.Parameter(constant, requires_grad=vq.trains_projection)
                self.register_parameter(name, trained_constant)
            else:
                self.register_buffer(name, constant)
        if self.keeps_sums:
            self.register_buffer("ema_sum", codes / self.num_codes)
        self.register_buffer("initialized", torch.tensor(vq.init == "uniform"))
        self.register_buffer("num_steps", torch.tensor(0, dtype=torch.int64))
        self.register_buffer("step_count", torch.zeros(shape[:2]), persistent=False)
        total = torch.zeros(shape if self.keeps_sums else (0, 0, 0))
        self.register_buffer("step_total", total, persistent=False)
        self.register_buffer("probes", torch.zeros(0, *shape[::2]), persistent=False)
        self.recent_usage = RecentUsage(*shape[:2])
        self.hold: CodeHold | None = None
        if trained and vq.freeze_after_steps is not None:
            self.hold = CodeHold(codes)
            self.codes.register_hook(self._without_gradient_when_frozen)
        self.probe_ids: torch.Tensor | None = None
        self.step_candidates: torch.Tensor | None = None
        self.needs_data_init = vq.init != "uniform"
        self._steps_taken = StepsTaken()

    @property
    def keeps_sums(self) -> bool:
        """Whether the update needs the sum of the tokens of each code."""
        return self.vq.codebook_update == "ema"

    def draw_codes(self, seed: int) -> torch.Tensor:
        """The codes before data, fp32 ``[C, K, D]``, drawn from ``seed``."""
        return uniform_codes(self.num_slices, self.num_codes, self.width, seed)

    # 1. into the codebook's space
    @staticmethod
    def constant_shapes(width: int, hidden_size: int) -> dict[str, list[int]]:
        """What the space is made of and, but for vq.train_projection, never moves: shape by buffer
        name, for D and H."""
        return {}

    def draw_constants(self, seed: int) -> dict[str, torch.Tensor]:
        """Those constants, drawn from ``seed``."""
        return {}

    @property
    def space(self) -> dict[str, torch.Tensor]:
        """Those constants as they are now."""
        return {name: getattr(self, name) for name in self.constant_shapes(0, 0)}

    @staticmethod
    def into_space(x: torch.Tensor, constants: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[T, H]`` tokens in the space where distances are taken, ``[T, C * D]``."""
        return x

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """:meth:`into_space` of this codebook."""
        return self.into_space(x, self.space)

    def code_vectors(self) -> torch.Tensor:
        """``[C, K, D]`` the vectors that tokens are compared with and replaced by."""
        return self.codes

    def lift(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors of the codebook's space ``[..., C * D]`` -> hidden vectors ``[..., H]``."""
        return vectors

    def lower(self, grads: torch.Tensor) -> torch.Tensor:
        """Gradients of lifted vectors ``[..., H]`` -> of the vectors; the transpose of lift."""
        return grads

    # 2. search and lookup
    @staticmethod
    def nearest(tokens: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """Prepared tokens ``[T, H]`` and ``[C, K, D]`` code vectors -> int64 ``[T, C]``, as
        :func:`nearest_code`; of an exported table too."""
        return nearest_code(tokens, vectors)

    def search(self, prepared: torch.Tensor) -> torch.Tensor:
        """Prepared tokens ``[T, H]`` -> code ids int64 ``[T, C]``; no gradient."""
        return self.nearest(prepared.detach(), self.code_vectors().detach())

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Code ids ``[T, C]`` -> their vectors ``[T, H]``, differentiable to ``codes``."""
        return look_up_codes(self.code_vectors(), ids)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens ``[T, H]`` -> prepared ones, as :meth:`prepare`.

        Called as a module before anything else of it in a pass, so that Megatron's overlapped
        gather of codes, scale and projection has finished.
        """
        return self.prepare(x)

    def parts(self, prepared: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """What of prepared tokens each of their codes ``[T, C]`` quantises: ``[T, C, D]``."""
        return prepared.view(-1, self.num_slices, self.width)

    def search_parts(self, parts: torch.Tensor) -> torch.Tensor:
        """Such parts ``[M, C, D]`` -> code ids int64 ``[M, C]``; no gradient."""
        return self.search(parts.flatten(1))

    def losses(
        self, prepared: torch.Tensor, vectors: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Commitment and codebook loss of prepared tokens, code vectors and codes; scalars, as
        :func:`quantization_losses`."""
        return quantization_losses(prepared, vectors, ids)

    def extra_loss(self, prepared: torch.Tensor) -> torch.Tensor | None:
        """A loss of the quantizer's own on prepared tokens, a mean over them with its coefficient
        applied; None: none."""
        return None

    # 3. what the step saw
    @torch.no_grad()
    def record(
        self, prepared: torch.Tensor, ids: torch.Tensor, candidate_rows: torch.Tensor | None
    ) -> None:
        """Add one microbatch to the step's accumulators.

        Args:
            prepared: ``[T, H]`` tokens in the codebook's space.
            ids: ``[T, C]`` their codes.
            candidate_rows: int64 rows of ``prepared`` offered to replace dead codes, behind those
                of the step's earlier microbatches; None: none of them.
        """
        tokens = self.parts(prepared.detach(), ids).to(self.step_count.dtype)
        # One per token, but NaN for a token with a NaN or Inf: apply_step then sees a broken step.
        ones = 1.0 + 0.0 * tokens.sum(dim=(1, 2))
        for c in range(self.num_slices):
            self.step_count[c] += segment_sum(ones.unsqueeze(1), ids[:, c], self.num_codes)[:, 0]
            if self.keeps_sums:
                self.step_total[c] += segment_sum(tokens[:, c], ids[:, c], self.num_codes)
        if candidate_rows is not None:
            offered = tokens.index_select(0, candidate_rows)
            before = self.step_candidates
            self.step_candidates = offered if before is None else torch.cat([before, offered])

    def clear_step(self) -> None:
        """Forget what the current step recorded."""
        self.step_count.zero_()
        self.step_total.zero_()
        self.step_candidates = None

    # 4. once per step
    @property
    def is_frozen(self) -> torch.Tensor:
        """Bool scalar on the device: whether a step's end now leaves the codebook as it is."""
        if self.vq.freeze_codebook or self.vq.freeze_after_steps is None:
            return torch.full_like(self.initialized, self.vq.freeze_codebook)
        return self.num_steps >= self.vq.freeze_after_steps

    def _without_gradient_when_frozen(self, grad: torch.Tensor) -> torch.Tensor:
        """Frozen codes count in no gradient norm, and Adam forgets them."""
        return grad.masked_fill(self.is_frozen, 0.0)

    def put_back_frozen(self) -> None:
        """Undo what an optimizer's step did to frozen codes; behind every such step."""
        if self.hold is not None:
            self.hold.put_back(self.codes.data)

    def usage_scalars(self, count: torch.Tensor) -> dict[str, torch.Tensor]:
        """fp32 scalars by metric name, of ``[C, K]`` tokens per code in one step; moves nothing."""
        return {
            "code_perplexity": code_perplexity(count),
            "dead_codes": (count == 0).sum().float(),
        }

    @torch.no_grad()
    def apply_step(self, statistics: StepStatistics) -> dict[str, torch.Tensor]:
        """Move the codebook by one step of reduced statistics and clear the accumulators.

        Statistics with a NaN or Inf, or of no token, leave the codebook as it is. Deterministic in
        the statistics and ``seed``, so replicas that start equal stay bit-equal. No communication.

        After ``vq.freeze_after_steps`` such steps (``num_steps``; a step with NaN counts, one of no
        token does not) codes, usage and sums stay.

        Returns:
            fp32 scalars: those of :meth:`usage_scalars` (``code_perplexity``, a mean over slices,
            1..K; ``dead_codes``), ``revived_codes``, ``codes_in_use`` (all three counts over
            slices), ``codebook_frozen`` (whether this step had to leave the codebook as it is), and
            ``assignment_change_rate`` (share of the previous step's probe tokens that have another
            code since the codebook moved; absent in the first step, which has no previous one).
        """
        has_tokens = (statistics.count > 0).any()
        frozen = self.is_frozen
        moves = self._finite(statistics) & has_tokens & ~frozen
        old = CodebookState(self.codes.data, self.usage, getattr(self, "ema_sum", None))
        metrics = self.usage_scalars(statistics.count)
        metrics["revived_codes"] = torch.zeros((), device=self.codes.device)
        metrics["codebook_frozen"] = frozen.float()
        self.recent_usage.add(statistics.count, self.vq.ema_decay)
        metrics["codes_in_use"] = self.recent_usage.num_in_use()
        if self.probe_ids is not None:  # not in the first step of a process
            metrics["assignment_change_rate"] = self._assignment_change_rate()
        if statistics.candidates is not None:  # with the codes that this step's tokens met
            self.probes = statistics.candidates[:NUM_PROBES].clone()
            self.probe_ids = self.search_parts(self.probes)
        if not self.vq.freeze_codebook:
            new, revived = self._moved(old, statistics)
            metrics["revived_codes"] = torch.where(moves, revived, 0.0)
            self.codes.data.copy_(torch.where(moves, new.codes, old.codes))
            self.usage.copy_(torch.where(moves, new.usage, old.usage))
            if new.ema_sum is not None and old.ema_sum is not None:
                self.ema_sum.copy_(torch.where(moves, new.ema_sum, old.ema_sum))
        if self.hold is not None:
            self.hold.take(self.codes.data, frozen)
        self.num_steps += torch.isnan(statistics.count).any() | has_tokens
        self._steps_taken.follow(self.num_steps)
        self.clear_step()
        return metrics

    def _moved(
        self, state: CodebookState, statistics: StepStatistics
    ) -> tuple[CodebookState, torch.Tensor]:
        seed = (self.seed * 1_000_003 + self._steps_taken.read(self.num_steps)) % 2**63
        if self.vq.codebook_update == "ema":
            state = ema_update(state, statistics, self.vq.ema_decay)
        else:
            state = update_usage(state, statistics.count, self.vq.ema_decay)
        revived = torch.zeros((), device=state.codes.device)
        if statistics.candidates is None:
            return state, revived
        if self.vq.codebook_update == "reanchor":
            return reanchor(state, statistics.candidates, self.vq.ema_decay, seed), revived
        if self.vq.dead_code_threshold > 0:
            state, is_revived = revive_dead_codes(
                state,
                statistics.candidates,
                self._revival_order(statistics.candidates, seed),
                self.vq.dead_code_threshold,
            )
            revived = is_revived.sum().float()
        return state, revived

    def _revival_order(self, candidates: torch.Tensor, seed: int) -> torch.Tensor:
        """int64 ``[M, C]``, by ``vq.revival``; errors are those before the step's move."""
        if self.vq.revival == "random":
            return random_order(candidates, seed)
        nearest = look_up_codes(self.code_vectors(), self.search_parts(candidates))
        return error_order(candidates, nearest.view_as(candidates), seed)

    def _finite(self, statistics: StepStatistics) -> torch.Tensor:
        finite = torch.isfinite(statistics.count).all()
        for part in (statistics.total, statistics.candidates):
            if part is not None:
                finite = finite & torch.isfinite(part).all()
        return finite

    def _assignment_change_rate(self) -> torch.Tensor:
        ids = self.search_parts(self.probes)
        return (ids != self.probe_ids).float().mean()

    @torch.no_grad()
    def reseed(self, seed: int) -> None:
        """Redraw the uniform start from ``seed``; for owners that learn their layer number late."""
        if seed != self.seed:
            self.seed = seed
            codes = self.draw_codes(seed)
            self.codes.data.copy_(codes)
            if self.keeps_sums:
                self.ema_sum.copy_(codes / self.num_codes)
            for name, constant in self.draw_constants(seed).items():
                getattr(self, name).data.copy_(constant)

    def _load_from_state_dict(self, *args, **kwargs) -> None:  # noqa: ANN002, ANN003
        super()._load_from_state_dict(*args, **kwargs)
        self.needs_data_init = not bool(self.initialized)
        self.probe_ids = None  # of tokens that met another codebook
        self.recent_usage.forget()
        if self.hold is not None:
            self.hold.forget()

    @torch.no_grad()
    def initialize_from(self, sample: torch.Tensor) -> None:
        """Set the codes from prepared tokens ``[M, H]`` (init: data or kmeans); once.

        Raises:
            ValueError: for an empty sample.
        """
        tokens = sample.detach().float().cpu().view(-1, self.num_slices, self.width)
        build = kmeans_codes if self.vq.init == "kmeans" else data_codes
        self.adopt(build(tokens, self.num_codes, self.seed))

    @torch.no_grad()
    def adopt(self, codes: torch.Tensor) -> None:
        """Start from ``[C, K, D]`` codes: usage uniform, sums at the codes."""
        self.codes.data.copy_(codes)
        self.usage.fill_(1.0 / self.num_codes)
        if self.keeps_sums:
            self.ema_sum.copy_(self.codes.data / self.num_codes)
        self.initialized.fill_(True)
        self.needs_data_init = False


def build_codebook(vq: VQConfig, hidden_size: int, seed: int) -> Codebook:
    """Build the codebook of ``vq.quantizer``; arguments and errors as :class:`Codebook`."""
    return registry.load("quantizer", vq.quantizer)(vq, hidden_size, seed)
