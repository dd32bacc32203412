"""The plots of one run, drawn from ``metrics.jsonl`` and ``routing.npz`` into ``<run_dir>/plots``.

Shapes in ``routing.npz`` (counts over the last logged interval): L routed layers, N experts,
C code slices, K codes; of a code memory A addresses, M rows each, read alike by all layers (Lr = 1,
as layer 0) or by each of Lr layers with codes of its own.
    expert_load [L, N] tokens per expert        code_usage [L, C, K] tokens per code
    combine_discrete_weight [L] in [0, 1]       layer_numbers [L] Megatron's, 1-based
    row_reads [Lr, A, M] reads per row          row_reads_of [Lr] layers, row_addresses [A] names

Colours are safe for colour-blind readers: Okabe and Ito's set for up to 7 layers, the ``cividis``
map by depth for more, ``PuOr`` for the heat map. A plot whose input is missing is skipped with a
printed reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from vqmoe_megatron.metrics.metric import LAYER_NAME
from vqmoe_megatron.rundir.file_names import METRICS_FILE, PLOT_FILES, ROUTING_FILE
from vqmoe_megatron.track.metrics_log import read_metrics

ROUTING_DIMENSIONS = {
    "expert_load": 2,
    "code_usage": 3,
    "combine_discrete_weight": 1,
    "layer_numbers": 1,
    "row_reads": 3,
    "row_reads_of": 1,
    "row_addresses": 1,
}
# What the first axis of an array counts, where it is not ``layer_numbers``.
COUNTED_BY = {
    "row_reads": "row_reads_of",
    "row_reads_of": "row_reads_of",
    "row_addresses": "row_addresses",
}
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
OKABE_ITO = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MAX_LEGEND_ROWS = 12  # with more layers, a colour bar replaces the legend
MAX_ANNOTATED_CELLS = 160  # numbers in the heat map's cells stay legible up to here

Records = list[dict[str, int | float]]
Routing = Mapping[str, np.ndarray]


def draw_run_plots(run_dir: str | Path) -> list[Path]:
    """Draw every plot the run has data for; return the files written, in a fixed order.

    ``ValueError`` when ``metrics.jsonl`` is damaged or ``routing.npz`` has the wrong arrays.
    No communication; call it on one rank.
    """
    run_dir = Path(run_dir)
    records = read_metrics(run_dir) if (run_dir / METRICS_FILE).exists() else []
    routing = read_routing(run_dir / ROUTING_FILE) if (run_dir / ROUTING_FILE).exists() else {}
    drawings: list[Callable[[], Figure | str]] = [
        lambda: draw_loss(records),
        lambda: draw_expert_load(routing),
        lambda: draw_code_usage(routing),
        lambda: draw_combine_weights(records),
        lambda: draw_row_reads(routing),
    ]
    written = []
    for path, draw in zip(map(run_dir.joinpath, PLOT_FILES), drawings, strict=True):
        with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False}):
            result = draw()
            if isinstance(result, str):
                print(f"plots: {path.stem} skipped: {result}")
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            result.savefig(path, dpi=120)
            written.append(path)
    return written


def read_routing(path: str | Path) -> dict[str, np.ndarray]:
    """Read ``routing.npz``; ``ValueError`` when an array has the wrong rank or number of layers."""
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in ROUTING_DIMENSIONS if name in archive}
    for name, array in arrays.items():
        counted_by = COUNTED_BY.get(name, "layer_numbers")
        size = len(arrays[counted_by]) if counted_by in arrays else -1
        if array.ndim != ROUTING_DIMENSIONS[name] or len(array) != size:
            raise ValueError(
                f"{path}: {name} has shape {list(array.shape)}; expected "
                f"{ROUTING_DIMENSIONS[name]} dimensions, the first being the {size} of {counted_by}"
            )
    return arrays


def draw_loss(records: Records) -> Figure | str:
    """Draw training and validation loss, and validation bits per byte in a panel below."""
    train = _series(records, "loss")
    if not len(train[0]):
        return "metrics.jsonl holds no finite training loss"
    validation, bits = _series(records, "val/loss"), _series(records, "val/bits_per_byte")
    panels = 2 if len(bits[0]) else 1
    figure = Figure(figsize=(8, 3.2 + 2.3 * (panels - 1)), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False, height_ratios=[2, 1][:panels])
    top: Axes = axes[0, 0]
    top.plot(*train, color=BLUE, linewidth=1.5, label="train")
    if len(validation[0]):
        top.plot(*validation, color=ORANGE, marker="o", markersize=4, label="validation")
    top.set_ylabel("loss (nats/token)")
    top.legend(frameon=False)
    if panels == 2:
        bottom: Axes = axes[1, 0]
        bottom.plot(*bits, color=ORANGE, marker="o", markersize=4)
        bottom.set_ylabel("validation\nbits per byte")
        best = int(np.argmin(bits[1]))
        bottom.set_title(
            f"best {bits[1][best]:.4f} at iteration {bits[0][best]:.0f}", fontsize=10, color=GREY
        )
    for axis in axes[:, 0]:
        _style(axis)
    axes[-1, 0].set_xlabel("iteration")
    return figure


def draw_expert_load(routing: Routing) -> Figure | str:
    """Draw layer x expert load as a heat map, each layer scaled so that 1 is a uniform share."""
    if "expert_load" not in routing:
        return f"no expert_load in {ROUTING_FILE}"
    load = routing["expert_load"].astype(np.float64)
    if not load.size or not load.sum():
        return "no token was routed in the last interval"
    num_layers, num_experts = load.shape
    relative = load / np.maximum(load.mean(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    size = (min(14.0, 3.5 + 0.5 * num_experts), min(12.0, 1.8 + 0.4 * num_layers))
    figure = Figure(figsize=size, layout="constrained")
    axis: Axes = figure.subplots()
    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=max(2.0, float(relative.max())))
    image = axis.imshow(relative, norm=norm, cmap="PuOr_r", aspect="auto", interpolation="nearest")
    if relative.size <= MAX_ANNOTATED_CELLS:
        for (row, column), value in np.ndenumerate(relative):
            dark = abs(float(norm(value)) - 0.5) > 0.3
            colour = "white" if dark else "black"
            axis.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, size=8)
    axis.set(xlabel="expert", ylabel="layer")
    axis.set_title("tokens per expert (1 = uniform share)", fontsize=11)
    axis.xaxis.set_major_locator(MaxNLocator(min(num_experts, 16), integer=True))
    every = math.ceil(num_layers / 24)
    axis.set_yticks(range(0, num_layers, every), routing["layer_numbers"][::every])
    bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02, spacing="proportional")
    above = [tick for tick in MaxNLocator(4).tick_values(1.0, norm.vmax) if 1 < tick <= norm.vmax]
    bar.set_ticks([0, 0.5, 1, *above])
    return figure


def draw_code_usage(routing: Routing) -> Figure | str:
    """Draw each codebook's usage share, sorted; perplexity and unused codes in the legend."""
    if "code_usage" not in routing or not routing["code_usage"].size:
        return f"no code_usage in {ROUTING_FILE} (a run without vector-quantised layers)"
    usage = routing["code_usage"].astype(np.float64)
    if not usage.sum():
        return "no code was used in the last interval"
    num_layers, num_slices, num_codes = usage.shape
    share = usage / np.maximum(usage.sum(axis=-1, keepdims=True), 1.0)
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis: Axes = figure.subplots()
    rank = np.arange(1, num_codes + 1)
    all_perplexities: list[float] = []
    for row, number in enumerate(routing["layer_numbers"]):
        perplexities, colour = [], _layer_colour(row, num_layers)
        for part in share[row]:
            ordered = np.sort(part)[::-1]
            axis.plot(rank, np.where(ordered > 0, ordered, np.nan), color=colour, linewidth=1.6)
            used = part[part > 0]
            entropy = -float((used * np.log(used)).sum())
            perplexities.append(math.exp(entropy) if len(used) else 0.0)
        unused = int((usage[row] == 0).sum())
        label = f"{number}: {', '.join(f'{p:.1f}' for p in perplexities)} ({unused} unused)"
        axis.plot([], [], color=colour, label=label)
        all_perplexities += perplexities
    low, high = min(all_perplexities), max(all_perplexities)
    axis.set_title(f"code perplexity {low:.1f} to {high:.1f} of {num_codes}", fontsize=11)
    axis.axhline(1 / num_codes, color=GREY, linestyle="--", linewidth=1.2)
    axis.annotate(
        "uniform", (num_codes, 1 / num_codes), color=GREY, size=9, ha="right", va="bottom"
    )
    axis.set(xlabel="code, most used first", ylabel="share of tokens", yscale="log")
    axis.set_xlim(0.5, num_codes + 0.5)
    _style(axis)
    _name_layers(figure, axis, routing["layer_numbers"], "layer: code perplexity")
    return figure


def draw_combine_weights(records: Records) -> Figure | str:
    """Draw each layer's weight of the discrete path over the iterations."""
    names = {
        int(match[2]): match[0]
        for record in records
        for match in map(LAYER_NAME.match, record)
        if match and match[3] == "combine_discrete_weight"
    }
    numbers = sorted(names)
    if not numbers:
        return "metrics.jsonl holds no vq/layer_XX/combine_discrete_weight"
    if not any(record.get(name) for record in records for name in names.values()):
        return "every weight is 0 (a run without discrete path)"
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis: Axes = figure.subplots()
    for row, number in enumerate(numbers):
        colour = _layer_colour(row, len(numbers))
        iterations, weights = _series(records, names[number])
        last = f"{weights[-1]:.3f}" if len(weights) else "not finite"
        axis.plot(iterations, weights, color=colour, linewidth=1.6, label=f"{number}: {last}")
    axis.set(xlabel="iteration", ylabel="weight of the discrete path, $p_d$")
    axis.set_ylim(bottom=0)
    _style(axis)
    _name_layers(figure, axis, np.array(numbers), "layer: last weight")
    return figure


def draw_row_reads(routing: Routing) -> Figure | str:
    """Draw how often the rows of each address were read, most read first, both axes logarithmic.

    A straight line is a power law, as of words; a line that ends early leaves rows unread. With
    codes of hidden states each address has a line for every layer.
    """
    if "row_reads" not in routing or not routing["row_reads"].size:
        return f"no row_reads in {ROUTING_FILE} (no code memory, or no interval was logged)"
    reads = routing["row_reads"].astype(np.float64)
    if not reads.sum():
        return "no row was read in the last interval"
    num_layers, num_addresses, num_rows = reads.shape
    if len(routing.get("row_addresses", ())) != num_addresses:
        return f"row_addresses of {ROUTING_FILE} do not name the {num_addresses} of row_reads"
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis: Axes = figure.subplots()
    rank = np.arange(1, num_rows + 1)
    for number, name in enumerate(routing["row_addresses"]):
        colour = _layer_colour(number, num_addresses)
        for of_layer in reads[:, number]:
            ordered = np.sort(of_layer)[::-1]
            axis.plot(rank, np.where(ordered > 0, ordered, np.nan), color=colour, linewidth=1.4)
        used = float((reads[:, number] > 0).mean())
        axis.plot([], [], color=colour, label=f"{name}: {used:.1%}")
    layers = "the model" if num_layers == 1 else f"{num_layers} layers"
    axis.set_title(f"reads of {num_rows:,} rows per address, {layers}", fontsize=11)
    axis.set(xlabel="row, most read first", ylabel="reads", xscale="log", yscale="log")
    axis.set_xlim(0.9, num_rows * 1.1)
    axis.grid(True, color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines["right"].set_visible(False)
    axis.legend(
        title="address: rows read",
        frameon=False,
        fontsize=9,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
    )
    return figure


def _series(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (iterations, values) of the records holding a finite ``name``; both ``[n]``."""
    pairs = [
        (record["iteration"], record[name])
        for record in records
        if name in record and math.isfinite(record[name])
    ]
    array = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _layer_colour(row: int, num_layers: int) -> tuple[float, ...]:
    """Return one of the named colours when they suffice, else one by depth, not too pale."""
    if num_layers <= len(OKABE_ITO):
        return matplotlib.colors.to_rgba(OKABE_ITO[row])
    return matplotlib.colormaps["cividis"](0.9 * row / max(1, num_layers - 1))


def _name_layers(figure: Figure, axis: Axes, numbers: np.ndarray, title: str) -> None:
    """Name the layers beside the axis: a legend when it fits, else a colour bar by depth."""
    if len(numbers) <= MAX_LEGEND_ROWS:
        axis.legend(
            title=title, frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0)
        )
        return
    colours = [_layer_colour(row, len(numbers)) for row in range(len(numbers))]
    mapping = matplotlib.cm.ScalarMappable(
        matplotlib.colors.Normalize(float(numbers[0]), float(numbers[-1])),
        matplotlib.colors.ListedColormap(colours),
    )
    figure.colorbar(mapping, ax=axis, label="layer", pad=0.02)


def _style(axis: Axes) -> None:
    axis.grid(True, color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines["right"].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    if axis.get_yscale() == "linear":
        axis.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
