"""Fine-tuning runs of one checkpoint: a recipe for every mode and seed, and the table of all.

    OUT/recipes/MODE_seed_N.yaml     what vqmoe pretrain is started with, here or under srun
    OUT/MODE_seed_N/                 the run directory
    OUT/test/MODE_seed_N.json        vqmoe evaluate --split test, where there is a test split
    OUT/finetune.json                the table

Everything is judged before the first write. Imports no Megatron.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vqmoe_megatron import __version__
from vqmoe_megatron.checkpoint.content import check_format_version, read_content
from vqmoe_megatron.checkpoint.folder import find_checkpoint, stored_tokenizer
from vqmoe_megatron.checkpoint.remap_rules import check_backbone
from vqmoe_megatron.config import FinetuneConfig, RunConfig
from vqmoe_megatron.config.finetune import MODES, path_of_mode, tuned_recipe
from vqmoe_megatron.config.recipe import apply_overrides, load_saved_recipe, save_recipe
from vqmoe_megatron.data.corpus import check_tokenizer, load_corpus
from vqmoe_megatron.data.labelled_samples import EncodedTexts, encode_splits
from vqmoe_megatron.data.labelled_texts import CLASSES, LabelledTexts, load_labelled_texts
from vqmoe_megatron.data.tokenizers import load_tokenizer
from vqmoe_megatron.plan.flops import run_flops
from vqmoe_megatron.plan.layout import ParallelLayout, check_layout, minimum_world_size
from vqmoe_megatron.plan.parameter_count import count_parameters, count_trained
from vqmoe_megatron.rundir.atomic import replace_file
from vqmoe_megatron.rundir.file_names import CONFIG_FILE, METRICS_FILE
from vqmoe_megatron.rundir.own_outputs import check_new_folder, is_result_of, refuse_foreign
from vqmoe_megatron.rundir.status import read_status
from vqmoe_megatron.runtime.world import choose_device
from vqmoe_megatron.train.preflight import check_parts

WRITER = "vqmoe finetune"
TABLE_FILE = "finetune.json"
DEFAULT_PASSES = 3  # over the training texts
LENGTH_MULTIPLE = 16  # of a sample's tokens, so that tensor-parallel ranks can cut it
SET_BY_OPTIONS = ("train.task", "train.seed", "train.output_dir", "checkpoint.load")
RECIPE_NAME = re.compile(rf"({'|'.join(MODES)})_seed_-?\d+\.yaml")


@dataclass(frozen=True)
class FinetuneRun:
    """One mode under one seed."""

    mode: str
    seed: int
    config: RunConfig
    out: Path

    @property
    def name(self) -> str:
        """Of its directory and recipe."""
        return f"{self.mode}_seed_{self.seed}"

    @property
    def recipe(self) -> Path:
        """Where its recipe is written."""
        return self.out / "recipes" / f"{self.name}.yaml"

    @property
    def run_dir(self) -> Path:
        """Its run directory."""
        return self.out / self.name

    @property
    def test_file(self) -> Path:
        """Its scores on the test split."""
        return self.out / "test" / f"{self.name}.json"

    @property
    def is_done(self) -> bool:
        """Whether it has trained all its iterations."""
        status = read_status(self.run_dir)
        iters = self.config.train.train_iters
        return status is not None and (status.state, status.iteration) == ("completed", iters)

    def test_scores(self) -> dict[str, float] | None:
        """What ``vqmoe evaluate`` found of this run on the test split; None before.

        Raises:
            ValueError: for a file about something else.
        """
        if not os.path.lexists(self.test_file):
            return None
        about = (self.name, self.config.train.train_iters, "test", self.config.finetune.path)
        try:
            found = json.loads(self.test_file.read_bytes())
            run_dir = Path(found["checkpoint"]).parent.parent  # of checkpoints/iter_NUMBER
            is_about = run_dir.name, found["iteration"], found["split"], found["data"]
            if is_result_of(self.test_file, "vqmoe evaluate") and is_about == about:
                return {name: float(value) for name, value in found["scores"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # nothing that the command writes
        refuse_foreign(self.test_file, WRITER)


@dataclass(frozen=True)
class Finetuning:
    """What may be done; see :func:`check_finetuning`."""

    checkpoint: Path  # iter_ folder
    out: Path
    runs: list[FinetuneRun]
    layout: ParallelLayout
    has_test: bool
    texts: dict[str, dict[str, float]]  # split -> number, share of filling, cut ones
    notes: tuple[str, ...]


def check_finetuning(
    checkpoint: Path,
    dataset: str,
    data: Path,
    modes: list[str],
    seeds: list[int],
    overrides: list[str],
    out: Path,
    num_ranks: int | None,
) -> Finetuning:
    """Judge everything by files alone; nothing is written.

    Raises:
        ValueError: for a checkpoint, texts, mode, setting or directory that cannot do it.
    """
    folder = find_checkpoint(checkpoint)
    if folder is None:
        raise ValueError(f"{checkpoint} holds no complete checkpoint")
    check_format_version(folder, read_content(folder))
    stored = load_saved_recipe(folder / CONFIG_FILE)
    for name, values in (("--mode", modes), ("--seeds", seeds)):
        if len(set(values)) < len(values) or not values:
            raise ValueError(
                f"{name} {','.join(map(str, values))}: name each once, and at least one"
            )
    for mode in modes:
        FinetuneConfig(mode=mode)  # is legal
        path_of_mode(stored.vq.path, mode)
    for text in overrides:
        key = text.partition("=")[0].strip()
        if key in SET_BY_OPTIONS or key.startswith("finetune."):
            raise ValueError(f"override {text!r}: {WRITER} sets {key} itself, by its options")
    found = load_labelled_texts(dataset, data)
    names = _named_classes(found, data)
    section = FinetuneConfig(dataset, str(data), modes[0], len(found.classes), found.sha256, names)

    def recipe(mode: str, seq_length: int, train_iters: int | None, interval: int) -> RunConfig:
        own = replace(section, mode=mode)
        base = tuned_recipe(stored, str(folder), own, seq_length)
        train = replace(base.train, train_iters=train_iters or 1, eval_interval=interval)
        saves = replace(base.checkpoint, save_interval=interval)
        return apply_overrides(replace(base, train=train, checkpoint=saves), overrides)

    first = recipe(modes[0], stored.model.seq_length, None, 0)
    if not first.train.eval_iters or first.data.eval_split != "valid":
        raise ValueError(
            f"train.eval_iters={first.train.eval_iters}, data.eval_split={first.data.eval_split}: "
            f"the table of {WRITER} is of all dev texts after the last step, and of the test texts "
            "where there are any; leave both out"
        )
    corpus = load_corpus(Path(first.data.path))
    check_tokenizer(corpus, first.model.vocab_size, stored_tokenizer(folder))
    splits = encode_splits(found, load_tokenizer(corpus.path, corpus.tokenizer))
    seq_length = _seq_length(stored, splits)
    per_pass = math.ceil(len(splits["train"]) / first.train.global_batch_size)
    num_ranks = num_ranks or minimum_world_size(first)
    device, _ = choose_device(first.train.device)
    runs = []
    for mode in modes:
        config = recipe(mode, seq_length, DEFAULT_PASSES * per_pass, per_pass)
        layout = check_layout(config, num_ranks, device)
        check_parts(config, device)
        check_backbone(stored, config)
        runs += [_run(config, mode, seed, out) for seed in seeds]
    _check_out(out, runs)
    length = runs[0].config.model.seq_length
    shares = {
        name: {
            "texts": len(split),
            "padding_share": split.padding_share(length),
            "cut": split.num_cut(length),
            "majority_share": split.majority_share,
        }
        for name, split in splits.items()
    }
    return Finetuning(folder, out, runs, layout, "test" in splits, shares, found.notes)


def _seq_length(stored: RunConfig, splits: dict[str, EncodedTexts]) -> int:
    """As long as the longest text needs; never longer than in pretraining."""
    ours = stored.model.seq_length
    if stored.model.position_embedding_type == "learned_absolute":
        return ours  # rows of the position table
    longest = max(split.longest for split in splits.values())
    return min(ours, -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)


def _run(config: RunConfig, mode: str, seed: int, out: Path) -> FinetuneRun:
    name = f"{mode}_seed_{seed}"
    train = replace(config.train, seed=seed, output_dir=str(out / name))
    run_name = config.tracking.run_name or out.name
    tracking = replace(config.tracking, run_name=f"{run_name} {mode} seed {seed}")
    return FinetuneRun(mode, seed, replace(config, train=train, tracking=tracking), out)


def _check_out(out: Path, runs: list[FinetuneRun]) -> None:
    """Refuse a folder that this command did not make, and recipes that say something else."""
    names = [path.name for path in (out / "recipes").glob("[!.]*")]  # .NAME: of a killed write
    if not (out / "recipes").is_dir() or not all(map(RECIPE_NAME.fullmatch, names)):
        check_new_folder(out)
        return
    for run in runs:
        if run.recipe.exists() and not _says_the_same(load_saved_recipe(run.recipe), run.config):
            raise ValueError(
                f"{run.recipe} is there already and says something else; use the same options and "
                "settings to go on with these runs, or another --out"
            )
        run.test_scores()  # are this run's own
    table = out / TABLE_FILE
    if table.exists() and not is_result_of(table, WRITER):
        refuse_foreign(table, WRITER)


def _named_classes(texts: LabelledTexts, data: Path) -> list[str] | None:
    """The classes' names for the recipe; None where the data set fixes them."""
    if CLASSES[texts.dataset] is not None:
        return None
    for name in texts.classes:
        if "${" in name:
            raise ValueError(
                f"the train split of {data} has the class {name!r}: a recipe, which keeps the "
                "names, would take ${ for a reference to another setting; rename the class"
            )
    return list(texts.classes)


def _says_the_same(saved: RunConfig, config: RunConfig) -> bool:
    """Whether two recipes are equal but for the classes' names, which follow from the texts'
    sha256; recipes from before they were kept lack them."""
    names = config.finetune.classes
    return replace(saved, finetune=replace(saved.finetune, classes=names)) == config


def write_recipes(finetuning: Finetuning) -> None:
    """Write what is missing of the runs' recipes."""
    for run in finetuning.runs:
        if not run.recipe.exists():
            save_recipe(run.config, run.recipe)


def dev_scores(run: FinetuneRun) -> dict[str, float]:
    """The last evaluation in the run's log.

    Raises:
        ValueError: for a log without one.
    """
    last: dict[str, float] = {}
    path = run.run_dir / METRICS_FILE
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        last = record if "val/accuracy" in record else last
    if not last:
        raise ValueError(f"{path} holds no val/accuracy")
    return {name: last[name] for name in ("val/loss", "val/accuracy")}


def sizes_of(config: RunConfig, layout: ParallelLayout) -> dict[str, float]:
    """Parameters and operations of a mode, by the plan's formulas."""
    flops = run_flops(config, layout)
    parameters = count_parameters(config, layout)
    return {
        "trainable_parameters": count_trained(config),
        "total_parameters": parameters.total,
        "active_parameters_per_token": parameters.active,
        "forward_flops_per_token": flops.all_ranks.forward / flops.num_tokens,
        "training_flops_per_token": flops.per_token,
    }


def write_table(finetuning: Finetuning, rows: list[dict]) -> Path:
    """Write ``finetune.json``; return its path."""
    first = finetuning.runs[0].config
    content = {
        "command": WRITER,
        "written_by": f"vqmoe_megatron {__version__}",
        "checkpoint": str(finetuning.checkpoint),
        "finetune": {k: v for k, v in asdict(first.finetune).items() if k != "mode"},
        "texts": finetuning.texts,
        "seq_length": first.model.seq_length,
        "train_iters": first.train.train_iters,
        "global_batch_size": first.train.global_batch_size,
        "lr": first.optimizer.lr,
        "rows": rows,
    }
    path = finetuning.out / TABLE_FILE
    replace_file(path, json.dumps(content, indent=2) + "\n")
    return path
