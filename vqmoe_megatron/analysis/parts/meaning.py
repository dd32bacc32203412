"""Part ``meaning``: what codes, and experts, say about tokens, with examples a person can read.

T tokens. Of several choices of a token the first counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
import torch

from vqmoe_megatron.analysis.meaning import meaning_of, table_of_counts
from vqmoe_megatron.analysis.part import Findings, Part, Subject, applying, reasons
from vqmoe_megatron.analysis.parts.plots import draw_lines, layer_axis, name_lines
from vqmoe_megatron.analysis.settings import Settings
from vqmoe_megatron.analysis.text import Text, parts_of_speech
from vqmoe_megatron.study.report.page import Section, Table, drawn_section
from vqmoe_megatron.study.report.plot_style import panels

PLOT = "meaning.png"
TOKEN, POSITION, SPEECH = "token", "position", "part of speech"
NUM_POSITIONS = 16  # equal parts of the window
NUM_CODES, NUM_EXAMPLES, CONTEXT_TOKENS = 4, 3, 18  # shown of each layer


def measure(subject: Subject) -> Findings:
    """Information and purity of every layer's choices, and contexts of those that say most."""
    settings, text, seen = subject.settings, subject.text, subject.seen
    chosen = [c for c in seen.choices.values() if c.is_per_token]
    if not chosen:
        return {"reason": "nothing is chosen token by token"}
    places = text.places(seen.window, seen.places)
    speech = parts_of_speech(text, places, settings.tags)
    classes = {TOKEN: seen.tokens, POSITION: seen.places * NUM_POSITIONS // text.seq_length}
    known = torch.ones(len(seen.tokens), dtype=torch.bool)
    if speech.classes is not None:
        classes[SPEECH] = torch.from_numpy(speech.classes[places])
        known = classes[SPEECH] >= 0
    rows, examples = [], []
    for choices in chosen:
        codes = choices.ids[:, 0]
        for what, of_tokens in classes.items():
            is_used = known if what == SPEECH else torch.ones_like(known)
            if is_used.any():
                draws = settings.generator("shuffle")
                found = meaning_of(codes[is_used], of_tokens[is_used], draws)
                place = {"layer": choices.layer, "kind": choices.kind, "class": what}
                rows.append(place | asdict(found))
        if choices.is_code:
            place = {"layer": choices.layer, "kind": choices.kind}
            shown = code_examples(codes, seen.tokens, places, text, settings)
            examples += [place | example for example in shown]
    return {"rows": rows, "examples": examples, "speech": speech.said}


def code_examples(
    codes: torch.Tensor, tokens: torch.Tensor, places: np.ndarray, text: Text, settings: Settings
) -> list[Findings]:
    """The codes that say most about their tokens, each with its tokens and some contexts.

    A code's share of I(code; token) is what it says: many tokens, of a kind that others have not.
    """
    counts = table_of_counts(codes, tokens)
    ids, kinds = codes.unique(), tokens.unique()
    total = counts.sum()
    of_code = counts.sum(dim=1, keepdim=True)
    expected = of_code * counts.sum(dim=0) / total
    said = torch.where(counts > 0, counts * (counts / expected).log(), 0.0).sum(dim=1) / total
    draws = settings.generator("examples")
    found = []
    for row in said.argsort(descending=True)[:NUM_CODES].tolist():
        at = places[(codes == ids[row]).numpy()]
        picked = at[torch.randperm(len(at), generator=draws)[:NUM_EXAMPLES].numpy()]
        top = counts[row].argsort(descending=True)[:5].tolist()
        shares = [float(counts[row, column] / of_code[row]) for column in top]
        said_tokens = [text.say(kinds[column : column + 1].numpy()) for column in top]
        found.append(
            {
                "code": int(ids[row]),
                "share": float(of_code[row] / total),
                "information_nats": float(said[row]),
                "tokens": [
                    f"{visible(token)} {share:.0%}"
                    for token, share in zip(said_tokens, shares, strict=True)
                    if share
                ],
                "contexts": [context(text, int(place)) for place in picked],
            }
        )
    return found


def context(text: Text, place: int) -> str:
    """The text around token ``place`` of the split, which stands in brackets."""
    first = max(0, place - CONTEXT_TOKENS)
    before = text.say(text.all_tokens[first:place])
    token = text.say(text.all_tokens[place : place + 1])
    after = text.say(text.all_tokens[place + 1 : place + 1 + CONTEXT_TOKENS // 2])
    return visible(f"{before}\u27e6{token}\u27e7{after}")


def visible(text: str) -> str:
    """One line; spaces that cannot be seen otherwise are shown."""
    shown = text.replace("\n", "\u21b5").replace("\t", "\u21e5").replace("\r", "\u240d")
    return shown if shown.strip() else shown.replace(" ", "\u2423")


def section(findings: Mapping[str, Findings], settings: Settings) -> Section:
    """Information over layers; a table of figures, and one of examples."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    cells, shown = [], []
    for name, found in applying(findings).items():
        for row in found["rows"]:
            beyond = row["information_nats"] - row["information_by_chance"]
            share = beyond / row["class_entropy_nats"] if row["class_entropy_nats"] else 0.0
            series = lines.setdefault(row["class"], {}).setdefault(f"{name}: {row['kind']}", [])
            series.append((row["layer"], share))
            figures = ("information_nats", "information_by_chance", "class_entropy_nats")
            cells.append(
                [name, str(row["layer"]), row["kind"], row["class"]]
                + [f"{row[key]:.3f}" for key in figures]
                + [f"{share:.1%}"]
                + [f"{row[key]:.3f}" for key in ("purity", "purity_by_chance")]
            )
        for example in found["examples"]:
            contexts = [*example["contexts"], *[""] * NUM_EXAMPLES][:NUM_EXAMPLES]
            shown.append(
                [name, str(example["layer"]), f"{example['kind']}: {example['code']}"]
                + [f"{example['share']:.1%}", "  ".join(example["tokens"]), *contexts]
            )
    drawn = "no model chooses token by token"
    if cells:
        drawn, axes = panels(len(lines), share_y=True)
        for axis, (what, of_class) in zip(axes, lines.items(), strict=True):
            draw_lines(axis, of_class, "layer", f"share of {what}'s entropy")
            layer_axis(axis)
        axes[0].set_ylim(bottom=min(0.0, axes[0].get_ylim()[0]))
        name_lines(drawn, axes, 2)
    said = {found["speech"] for found in applying(findings).values()}
    texts = [
        *reasons(findings),
        *said,
        "Mutual information in nats of a code, or an expert, with the token that is read, with the "
        f"place in the window (in {NUM_POSITIONS} parts), and with the part of speech; by chance: "
        "the mean of five shufflings of the codes. Purity: the share of tokens that are of their "
        "code's most frequent class.",
    ]
    headings = ["model", "layer", "what", "class", "information", "by chance", "entropy of class"]
    tables = [Table([*headings, "beyond chance / entropy", "purity", "by chance"], cells)]
    if shown:
        headings = ["model", "layer", "code", "tokens", "most frequent", *["context"] * 3]
        tables.append(
            Table(
                headings,
                shown,
                "Codes that contribute most to the information about the token, with contexts "
                "drawn at random: the token that has the code stands in \u27e6 \u27e7, \u21b5 is "
                "the end of a line.",
            )
        )
    caption = (
        "What choices say, beyond chance. 1 would be a code from which the class can be told; 0 a "
        "code that says nothing of it."
    )
    return drawn_section(
        "What codes mean", [(PLOT, drawn, caption)], texts, tables if cells else []
    )


MEANING = Part("meaning", measure, section)
