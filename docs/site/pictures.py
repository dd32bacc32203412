"""Draw the pictures of the concept pages: python docs/site/pictures.py writes docs/pictures/*.svg.

A page takes a picture in as it is, so its text and lines have the page's colours, light or dark;
opened by itself it has those of the fallbacks. Numbers in a picture are computed: experts by
``mod``, rows by ``vq.row_addresses``, places of ranks by ``plan.grid``. A test draws them anew and
compares.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "pictures"
sys.path.insert(0, str(ROOT))

COLOURS = ("#5c6bc0", "#00a08a", "#e08e00", "#d0487a")
STYLE = """\
.pic text{font:13px system-ui,sans-serif;fill:var(--md-default-fg-color,#333)}
.pic .head{font-weight:600}.pic .small{font-size:11.5px}.pic .code{font-family:monospace}
.pic .line{stroke:var(--md-default-fg-color--light,#777);fill:none}
.pic .tip{fill:var(--md-default-fg-color--light,#777)}
.pic .plain{fill:none;stroke:var(--md-default-fg-color--light,#777)}
.pic .area{fill:var(--md-default-fg-color--lightest,#eee);stroke:none;opacity:.7}"""


class Picture:
    """An SVG that grows by boxes, words and arrows; lengths in pixels."""

    def __init__(self, title: str, width: int, height: int) -> None:
        self.title, self.width, self.height = title, width, height
        self.parts: list[str] = []

    def area(self, x: float, y: float, width: float, height: float, name: str) -> None:
        """A region with its name at its top left, for instance a rank."""
        self.parts.append(
            f'<rect class="area" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'
        )
        self.words(x + 8, y + 17, name, "head", "start")

    def box(
        self, x: float, y: float, width: float, height: float, text: str, colour: int | None = None
    ) -> None:
        """A box with its text in the middle, of a colour or plain."""
        paint = 'class="plain"'
        if colour is not None:
            hue = COLOURS[colour % len(COLOURS)]
            paint = f'fill="{hue}" fill-opacity=".25" stroke="{hue}"'
        self.parts.append(
            f'<rect {paint} x="{x}" y="{y}" width="{width}" height="{height}" rx="4"/>'
        )
        lines = text.split("\n")
        top = y + height / 2 + 4.5 - 8 * (len(lines) - 1)
        for number, line in enumerate(lines):
            self.words(x + width / 2, top + 16 * number, line)

    def words(self, x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> None:
        """One line of text at a base line."""
        named = f' class="{kind}"' if kind else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{named}>{escape(text)}</text>'
        )

    def arrow(
        self, x: float, y: float, to_x: float, to_y: float, colour: int | None = None
    ) -> None:
        """An arrow from one point to another: level at both ends, or straight down."""
        paint, tip = 'class="line"', 'class="tip"'
        if colour is not None:
            hue = COLOURS[colour % len(COLOURS)]
            paint, tip = f'fill="none" stroke="{hue}" stroke-width="1.5"', f'fill="{hue}"'
        if x == to_x:
            path, points = f"M{x} {y}L{to_x} {to_y - 7}", ((-4, -8), (4, -8))
        else:
            bend = (to_x - x) / 2
            path = f"M{x} {y}C{x + bend} {y} {to_x - bend} {to_y} {to_x - 7} {to_y}"
            points = ((-8, -4), (-8, 4))
        self.parts.append(f'<path {paint} d="{path}"/>')
        corners = " ".join(f"{to_x + dx:g},{to_y + dy:g}" for dx, dy in points)
        self.parts.append(f'<polygon {tip} points="{to_x},{to_y} {corners}"/>')

    def svg(self) -> str:
        """The whole file."""
        head = (
            f'<svg class="pic" xmlns="http://www.w3.org/2000/svg" role="img" '
            f'viewBox="0 0 {self.width} {self.height}" width="{self.width}">'
        )
        named = f"<title>{escape(self.title)}</title>\n<style>\n{STYLE}\n</style>"
        return "\n".join([head, named, *self.parts, "</svg>\n"])


def routing() -> Picture:
    """Tokens of two ranks, their nearest of 8 codes, and the owners of 4 experts."""
    num_codes, num_experts, num_ranks = 8, 4, 2
    codes = ((5, 2, 7), (0, 6, 5))
    picture = Picture("From a token to its expert's rank", 760, 350)
    for x, text in ((70, "tokens"), (205, "nearest code k"), (355, "expert = k mod 4")):
        picture.words(x, 18, text, "head")
    picture.words(490, 18, "all-to-all", "head")
    picture.words(655, 18, "experts and their codes", "head")
    per_rank = num_experts // num_ranks
    for rank, of_rank in enumerate(codes):
        top = 30 + 150 * rank
        picture.area(5, top, 425, 140, f"rank {rank}")
        picture.area(550, top, 205, 140, f"rank {rank}")
        for place in range(per_rank):
            expert = rank * per_rank + place
            own = [str(code) for code in range(num_codes) if code % num_experts == expert]
            text = f"expert {expert}: codes {', '.join(own)}"
            picture.box(562, top + 32 + 52 * place, 181, 40, text, expert)
        for number, code in enumerate(of_rank):
            y = top + 28 + 36 * number
            expert = code % num_experts
            picture.box(30, y, 80, 28, f"token {3 * rank + number}")
            picture.arrow(110, y + 14, 165, y + 14)
            picture.box(165, y, 80, 28, f"k = {code}", expert)
            picture.arrow(245, y + 14, 310, y + 14)
            picture.box(310, y, 90, 28, f"{code} mod 4 = {expert}", expert)
            owner, place = divmod(expert, per_rank)
            picture.arrow(400, y + 14, 562, 30 + 150 * owner + 52 + 52 * place, expert)
    picture.words(380, 342, "Outputs return the same way and are put back in order.", "small")
    return picture


def code_space() -> Picture:
    """8 code rows evaluated at their owners, gathered into a table that tokens read."""
    picture = Picture("One output per code, not per token", 760, 350)
    heads = ((110, "1. K code rows"), (330, "2. experts run on them"), (525, "3. all-gather"))
    for x, text in (*heads, (680, "4. tokens read")):
        picture.words(x, 18, text, "head")
    num_codes, num_experts, per_rank = 8, 4, 2
    order = []
    for rank in range(2):
        top = 30 + 150 * rank
        picture.area(5, top, 425, 140, f"rank {rank}")
        for place in range(per_rank):
            expert, y = rank * per_rank + place, top + 32 + 52 * place
            own = [code for code in range(num_codes) if code % num_experts == expert]
            for number, code in enumerate(own):
                picture.box(70 + 62 * number, y + 4, 54, 32, f"v{code}", expert)
            picture.arrow(190, y + 20, 250, y + 20, expert)
            picture.box(250, y, 165, 40, f"expert {expert}", expert)
            order += own
            picture.arrow(415, y + 20, 485, 55 + 28 * (len(order) - 1), expert)
    for number, code in enumerate(order):
        picture.box(485, 42 + 28 * number, 80, 26, f"E(v{code})", code % num_experts)
    picture.words(525, 288, "table [K, H]", "small")
    picture.words(525, 304, "on every rank", "small")
    for number, code in enumerate((5, 2, 7, 5, 5, 0)):
        y = 44 + 40 * number
        picture.box(640, y, 110, 30, f"token, k = {code}", code % num_experts)
        picture.arrow(565, 55 + 28 * order.index(code), 640, y + 15, code % num_experts)
    note = "Shapes do not follow the data: K rows, however many tokens there are."
    picture.words(380, 342, note, "small")
    return picture


def code_memory() -> Picture:
    """One token's three addresses, the rows they are, and their owners."""
    import torch

    from vqmoe_megatron.vq.row_addresses import row_ids

    num_rows, num_experts, num_ranks, text = 1024, 4, 2, "the cat sat"
    codes = torch.tensor([list(text.encode())])
    rows = row_ids(codes, torch.zeros_like(codes, dtype=torch.bool), num_rows, 3)[0, -1].tolist()
    picture = Picture("From the last codes to the rows of a token", 760, 358)
    for number, letter in enumerate(text):
        is_last = number == len(text) - 1
        picture.box(5 + 30 * number, 40, 28, 30, letter.replace(" ", "␣"), 0 if is_last else None)
    picture.words(170, 24, "codes (here: bytes)", "head")
    for x, head in ((465, "row r"), (600, "expert = r mod 4"), (710, "on rank")):
        picture.words(x, 24, head, "head")
    for order, row in enumerate(rows, start=1):
        y = 46 * order + 44
        last = text[-order:].replace(" ", "␣")
        picture.words(30, y + 21, f"address {order}:", "", "start")
        picture.box(115, y, 30 * order + 12, 32, " ".join(last))
        picture.arrow(127 + 30 * order, y + 16, 420, y + 16)
        picture.words(320, y + 10, "its own number" if order == 1 else "hash", "small")
        expert = row % num_experts
        picture.box(420, y, 90, 32, f"{row:,}", expert)
        picture.arrow(510, y + 16, 560, y + 16)
        picture.box(560, y, 80, 32, f"{expert}", expert)
        picture.arrow(640, y + 16, 690, y + 16)
        picture.box(690, y, 40, 32, str(expert // (num_experts // num_ranks)), expert)
    picture.words(380, 256, "y = experts' output + the three rows", "code")
    steps = (
        (5, 155, "plan: which rows does\nthe microbatch read", None),
        (170, 120, "attention 1", None),
        (170, 120, "rows travel", 1),
        (300, 130, "experts 1\n+ rows", None),
        (440, 110, "layer 2", None),
        (560, 80, "attention 3", None),
        (560, 80, "rows travel", 1),
        (650, 105, "experts 3\n+ rows", None),
    )
    for number, (x, width, words, colour) in enumerate(steps):
        is_double = number in (1, 2, 5, 6)
        y = 276 + 24 * (number in (2, 6))
        picture.box(x, y, width, 22 if is_double else 46, words, colour)
    picture.arrow(5, 334, 755, 334)
    picture.words(380, 348, "time: one plan per microbatch, before the first layer", "small")
    return picture


def layouts() -> Picture:
    """Which rank holds what at TP 2 x EP 2 x PP 2 on eight ranks, as ``plan.grid`` places them."""
    from vqmoe_megatron.config import ParallelConfig, RunConfig
    from vqmoe_megatron.plan.grid import rank_grid
    from vqmoe_megatron.plan.layout import ParallelLayout

    sizes = ("tensor", "pipeline", "expert")
    config = RunConfig(
        parallel=ParallelConfig(**{f"{name}_model_parallel_size": 2 for name in sizes})
    )
    layout = ParallelLayout.from_config(config, 8)
    picture = Picture("Eight ranks at TP 2, EP 2, PP 2", 760, 390)
    experts = {0: "experts 0 to 3", 1: "experts 4 to 7"}
    for stage, layers in enumerate(("layers 1, 2", "layers 3, 4")):
        top = 8 + 180 * stage
        picture.area(5, top, 750, 170, f"stage {stage}: {layers}")
        for place in (p for p in rank_grid(layout) if p.pipeline == stage):
            x = 15 + 185 * (place.rank % 4)
            picture.box(x, top + 28, 175, 132, "", None)
            picture.words(x + 87, top + 47, f"rank {place.rank}", "head")
            half = f"attention, half {place.tensor}"
            picture.box(x + 8, top + 56, 159, 26, half, place.tensor)
            picture.box(x + 8, top + 86, 159, 26, experts[place.expert], 2 + place.expert)
            picture.words(x + 87, top + 129, "codebook: whole", "small")
            picture.words(x + 87, top + 148, f"samples of dp {place.data}", "small")
    picture.words(
        380,
        382,
        "Equal colours in a stage are equal weights, whose gradients are summed. "
        "Stages pass activations on.",
        "small",
    )
    return picture


def once_per_step() -> Picture:
    """What a microbatch does, and what is left to the end of the step."""
    picture = Picture("One optimizer step of two microbatches", 760, 330)
    picture.area(5, 5, 455, 275, "in every microbatch")
    picture.area(470, 5, 285, 275, "once per step")
    for number in range(2):
        x = 15 + 222 * number
        picture.words(x + 105, 46, f"microbatch {number + 1}", "head")
        rows = (
            ("forward: codes, rows, experts", None),
            ("forward: codes stay as they are", 0),
            ("backward: gradients\nare added up", None),
            ("backward: counts and sums\nof the codes are added up", 0),
        )
        y = 56
        for text, colour in rows:
            height = 46 if "\n" in text else 34
            picture.box(x, y, 213, height, text, colour)
            y += height + 12
    steps = (
        ("kept tables: one backward pass", 1),
        ("gradients are reduced", None),
        ("one all-reduce of all layers'\ncounts, sums and candidates", 0),
        ("all ranks agree: finite, or skip", None),
        ("optimizer; codebooks move", 0),
    )
    y = 34
    for number, (text, colour) in enumerate(steps):
        height = 46 if "\n" in text else 32
        picture.box(482, y, 261, height, text, colour)
        y += height
        if number < len(steps) - 1:
            picture.arrow(612, y, 612, y + 17)
            y += 17
    for line, text in enumerate(
        (
            "Counts are added up in the backward pass: evaluation and recomputation add nothing.",
            "A skipped step moves no code. Replicas compute the same update from the same sums: "
            "bit-equal codebooks.",
        )
    ):
        picture.words(380, 300 + 19 * line, text, "small")
    return picture


PICTURES: Sequence[Callable[[], Picture]] = (
    routing,
    code_space,
    code_memory,
    layouts,
    once_per_step,
)


def main() -> None:
    """Write every picture."""
    FOLDER.mkdir(exist_ok=True)
    for draw in PICTURES:
        (FOLDER / f"{draw.__name__}.svg").write_text(draw().svg(), "utf-8")


if __name__ == "__main__":
    main()
