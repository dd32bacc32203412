"""What a new run may take over from a model with other numbers of codes and experts.

K codes per slice, N experts, C slices. New expert e copies old expert e mod N_old; new code k
copies old code k mod K_old. Row r = slice * K + code goes to expert r mod N in either model.
Settings only: no torch, no ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from vqmoe_megatron.config import CodeMemoryConfig, ModelConfig, RunConfig
from vqmoe_megatron.config.finetune import path_of_mode
from vqmoe_megatron.config.quantizer_rules import IMPLICIT, SUMMED
from vqmoe_megatron.config.router_rules import other_router
from vqmoe_megatron.config.vq import VQConfig

REMAPPED = ("model.num_moe_experts", "vq.num_codes")
# What else decides which tensors a model has and their shapes; it must be equal.
SHAPING_SETTINGS = (
    "model.num_layers",
    "model.hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.kv_channels",
    "model.ffn_hidden_size",
    "model.moe_ffn_hidden_size",
    "model.moe_shared_expert_intermediate_size",
    "model.moe_layer_freq",
    "model.gated_linear_unit",
    "model.add_bias_linear",
    "model.add_qkv_bias",
    "model.normalization",
    "model.norm_placement",
    "model.position_embedding_type",
    "model.untie_embeddings_and_output_weights",
    "model.vocab_size",
    "model.make_vocab_size_divisible_by",
    "vq.num_code_slices",
    "vq.path",
    "vq.combine",
    "vq.norm",
    "vq.codebook_update",
    "vq.code_input",
    "vq.code_dim",
    "vq.fsq_levels",
    "vq.learn_code_scale",
    "vq.train_projection",
    "code_memory.num_rows",
    "code_memory.codes",
    "code_memory.num_codes",
    "code_memory.max_order",
    "code_memory.num_context_codes",
    "code_memory.context_decay",
    "code_memory.context_dim",
    "code_memory.layers",
    "code_memory.values",
    "code_memory.gate",
)
# They decide only how tensors start or how a step is computed; what is taken over has started.
WITHOUT_EFFECT = (
    "model.init_method_std",
    "model.embedding_init_method_std",
    "vq.combine_bias",
    "vq.init",
    "vq.execution",
    "vq.table_per_step",
    "vq.overlap_table",
    "code_memory.exchange",
)
SECTIONS = (("model", ModelConfig), ("vq", VQConfig), ("code_memory", CodeMemoryConfig))
RECOMPUTE_PREFIX = "model.recompute_"


@dataclass(frozen=True)
class _Sizes:
    """Codes per slice and experts, before and after."""

    num_slices: int
    old_codes: int
    new_codes: int
    old_experts: int
    new_experts: int

    def num_rows_on_other_experts(self, codes: range) -> int:
        """Rows of the new ``codes`` whose expert is no copy of the one their original goes to."""
        return sum(
            (s * self.new_codes + k) % self.new_experts % self.old_experts
            != (s * self.old_codes + k % self.old_codes) % self.old_experts
            for s in range(self.num_slices)
            for k in codes
        )


def check_remap(stored: RunConfig, wanted: RunConfig) -> list[str]:
    """Return what changes when ``wanted`` starts from a checkpoint of ``stored``, in sentences.

    Both with ``model.vocab_size`` filled in. No communication.

    Raises:
        ValueError: listing everything that cannot be remapped.
    """
    theirs, ours = _settings(stored), _settings(wanted)
    advice = "start anew, or keep the numbers of codes and experts"
    others = [other_router(config, "checkpoint.remap", advice) for config in (stored, wanted)]
    problems = [*filter(None, dict.fromkeys(others)), *_problems(theirs, ours)]
    if problems:
        raise ValueError(
            "checkpoint.remap changes vq.num_codes and model.num_moe_experts only; this checkpoint "
            "cannot be remapped to this recipe:\n  - " + "\n  - ".join(problems)
        )
    sizes = _Sizes(
        wanted.vq.num_code_slices,
        stored.vq.num_codes,
        wanted.vq.num_codes,
        stored.model.num_moe_experts,
        wanted.model.num_moe_experts,
    )
    sentences = [
        *_expert_sentences(sizes, wanted.vq),
        *(_code_sentences(sizes, wanted.vq) if wanted.vq.path != "continuous" else ()),
        *_memory_sentences(sizes, wanted.code_memory),
    ]
    others = [
        f"{name} {theirs[name]!r} -> {value!r}"
        for name, value in ours.items()
        if value != theirs[name] and _matters(name)
    ]
    if others:
        sentences.append(f"also different, in settings that shape no tensor: {', '.join(others)}")
    if wanted.vq.path != "continuous":
        sentences.append(_discrete_path_sentence(sizes, bool(others)))
    sentences.append(
        "only weights and codebooks are taken over: optimizer, schedule, data position, random "
        "state and iteration start anew"
    )
    return sentences


# What a fine-tuning run may have otherwise than its checkpoint, of the settings that shape tensors.
OF_FINETUNING = ("vq.path", "model.untie_embeddings_and_output_weights")


def check_backbone(stored: RunConfig, wanted: RunConfig) -> None:
    """Raise ``ValueError`` where a fine-tuning run's model is not the checkpoint's but for its head
    and the paths that its mode drops."""
    if stored.finetune.is_on:
        raise ValueError(
            "this checkpoint is of a fine-tuning run and has a classification head already; start "
            "from the pretrained one"
        )
    path = path_of_mode(stored.vq.path, wanted.finetune.mode)
    theirs, ours = _settings(stored), _settings(wanted)
    shaping = [name for name in SHAPING_SETTINGS if name not in OF_FINETUNING] + list(REMAPPED)
    shaping += ["vq.quantizer", "vq.code_map"]
    if wanted.vq.path == "continuous":
        shaping = [name for name in shaping if not name.startswith("vq.")]
    if ours["model.position_embedding_type"] == "learned_absolute":
        shaping.append("model.seq_length")
    problems = [
        f"{name}: checkpoint {theirs[name]!r}, recipe {ours[name]!r}"
        for name in shaping
        if theirs[name] != ours[name]
    ]
    if wanted.vq.path != path:
        problems.append(f"vq.path: the mode needs {path!r}, recipe {wanted.vq.path!r}")
    if problems:
        raise ValueError(
            "the recipe's model is not the checkpoint's; set these back:\n  - "
            + "\n  - ".join(problems)
        )


def _settings(config: RunConfig) -> dict[str, object]:
    config = replace(config, code_memory=config.code_memory.in_effect)
    return {
        f"{section}.{spec.name}": getattr(getattr(config, section), spec.name)
        for section, kind in SECTIONS
        for spec in fields(kind)
    }


def _matters(name: str) -> bool:
    return name not in (*REMAPPED, *WITHOUT_EFFECT) and not name.startswith(RECOMPUTE_PREFIX)


def _problems(theirs: dict[str, object], ours: dict[str, object]) -> Iterator[str]:
    shaping = list(SHAPING_SETTINGS)
    if ours["model.position_embedding_type"] == "learned_absolute":
        shaping.append("model.seq_length")  # rows of the position table
    for name in shaping:
        if theirs[name] != ours[name]:
            yield (
                f"{name}: checkpoint {theirs[name]!r}, recipe {ours[name]!r}; it decides the "
                "model's tensors or what they mean, set it back"
            )
    old_experts, new_experts = theirs["model.num_moe_experts"], ours["model.num_moe_experts"]
    if ours["vq.path"] != "discrete" and old_experts == 1 != new_experts:
        yield (
            f"model.num_moe_experts: checkpoint 1, recipe {new_experts}; a model with one "
            "expert has no router whose rows could be copied; start from one with several"
        )
    quantizers = theirs["vq.quantizer"], ours["vq.quantizer"]
    if len(set(quantizers)) > 1 and set(quantizers) & {*IMPLICIT, *SUMMED}:
        yield (
            f"vq.quantizer: checkpoint {quantizers[0]!r}, recipe {quantizers[1]!r}; codes of the "
            "one are no codes of the other, set it back"
        )
    if "filled" in (theirs["vq.path"], ours["vq.path"]):
        yield (
            "vq.path=filled: a copied code or expert would answer, and be weighed by the router's "
            "softmax, a second time; start anew, or keep num_codes and num_moe_experts"
        )
    has_codes = "continuous" not in (theirs["vq.path"], ours["vq.path"])
    if has_codes:
        for whose, settings in (("checkpoint", theirs), ("recipe", ours)):
            if settings["vq.code_map"] != "mod":
                yield (
                    f"vq.code_map: {whose} {settings['vq.code_map']!r}; a balanced or clustered "
                    "map is fixed for its codes and experts, so both sides need code_map=mod"
                )
    changed = [name for name in REMAPPED if theirs[name] != ours[name]]
    if not has_codes and "vq.num_codes" in changed:
        changed.remove("vq.num_codes")
    if not changed:
        without = "" if has_codes else " (vq.path=continuous has no codes)"
        yield (
            f"nothing to remap: vq.num_codes and model.num_moe_experts are the checkpoint's"
            f"{without}; leave checkpoint.remap out"
        )


def _expert_sentences(sizes: _Sizes, vq: VQConfig) -> Iterator[str]:
    old, new = sizes.old_experts, sizes.new_experts
    if old == new:
        return
    if new < old:
        yield f"experts {old} -> {new}: the first {new} are kept, {old - new} are dropped"
    else:
        with_router = "" if vq.path == "discrete" else ", with its row of the router"
        yield (
            f"experts {old} -> {new}: new expert e starts as a copy of expert e mod {old}"
            f"{with_router}"
        )
    if vq.path == "discrete":
        return
    if new < old:
        yield (
            "the continuous path does not compute the same function: tokens of the dropped experts "
            "go to others"
        )
    else:
        yield (
            "the continuous path does not compute the same function: the router's probability of "
            "an expert is split over its copies"
        )


def _code_sentences(sizes: _Sizes, vq: VQConfig) -> Iterator[str]:
    old, new = sizes.old_codes, sizes.new_codes
    if old == new:
        return
    if new < old:
        yield (
            f"codes {old} -> {new} per slice: the first {new} are kept; tokens of the other "
            f"{old - new} go to the nearest that is left"
        )
        return
    yield (
        f"codes {old} -> {new} per slice: new code k starts as a copy of code k mod {old}; ties go "
        f"to the lowest index, so the {new - old} copies get no tokens until they are moved"
    )
    if vq.freeze_codebook:
        yield "vq.freeze_codebook=true: the copies will never be moved, so more codes have no use"
    elif vq.freeze_after_steps is not None:
        yield (
            f"vq.freeze_after_steps={vq.freeze_after_steps} counts the checkpoint's steps, too: "
            "where it is not larger the copies will never be moved; set it higher, or to null"
        )
    elif vq.codebook_update != "reanchor" and vq.dead_code_threshold == 0:
        yield (
            "vq.dead_code_threshold=0: no dead code is re-seeded, so the copies may never get "
            "tokens; set it above 0"
        )


def _memory_sentences(sizes: _Sizes, memory: CodeMemoryConfig) -> Iterator[str]:
    if not memory.is_on or sizes.old_experts == sizes.new_experts:
        return
    yield "code memory: every row stays what it is and goes to its new owner, expert row mod N"
    if memory.values == "experts":
        yield (
            "code_memory.values=experts: rows are inputs of their owners, and most have another "
            "owner now, so tokens read other values"
        )


def _discrete_path_sentence(sizes: _Sizes, others_differ: bool) -> str:
    kept = range(min(sizes.old_codes, sizes.new_codes))
    copies = range(sizes.old_codes, sizes.new_codes)
    num_moved, num_moved_copies = map(sizes.num_rows_on_other_experts, (kept, copies))
    num_kept = sizes.num_slices * len(kept)
    about_copies = ""
    if num_moved_copies:
        about_copies = (
            f"; {num_moved_copies} of {sizes.num_slices * len(copies)} copied codes go to another "
            "expert than their original, which counts once they get tokens"
        )
    if num_moved:
        return (
            f"{num_moved} of {num_kept} codes change their expert's function (row mod N is another "
            f"expert's copy){about_copies}"
        )
    if sizes.new_codes < sizes.old_codes:
        return f"all {num_kept} kept codes keep their expert's function{about_copies}"
    apart = "apart from the settings above, " if others_differ else ""
    return (
        f"{apart}the discrete path computes exactly the same function at the start: every code "
        f"keeps its expert's function{about_copies}"
    )
