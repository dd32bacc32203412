"""``vqmoe``: thin commands over the floors below.

Exits: 0 done, 75 requeue, 2 usage, 1 crash, 130 interrupted, 128 + signal for a killed rank.
"""

from __future__ import annotations

from vqmoe_megatron.runtime.interrupts import one_line_interrupt

with one_line_interrupt():  # these take a third of a second
    import contextlib
    import os
    import sys
    import tempfile
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Annotated

    import typer

    from vqmoe_megatron import __version__
    from vqmoe_megatron.cli import (
        analyze,
        evaluate,
        export,
        finetune,
        generate,
        import_run,
        mlflow_sync,
        plan,
        preflight,
        upcycle,
    )
    from vqmoe_megatron.cli.attempt import attempt_app
    from vqmoe_megatron.cli.bench import bench_app
    from vqmoe_megatron.cli.checkpoint import checkpoint_app
    from vqmoe_megatron.cli.study import study_app
    from vqmoe_megatron.config import RunConfig
    from vqmoe_megatron.config.recipe import load_recipe, save_recipe
    from vqmoe_megatron.plan.layout import check_layout, minimum_world_size
    from vqmoe_megatron.runtime.standard_streams import (
        forgive_lost_output,
        lost_output,
        protect_standard_streams,
    )
    from vqmoe_megatron.runtime.third_party_noise import quiet_known_messages
    from vqmoe_megatron.runtime.versions import TORCH, check_versions, supported_version

EXIT_CRASH, EXIT_USAGE = 1, 2
# Not what they print.
RESULTS_ARE_FILES = (
    "prepare",
    "pretrain",
    "export",
    "import",
    "upcycle",
    "finetune",
    "mlflow-sync",
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train vector-quantised mixture-of-experts language models on Megatron-core.",
)
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(attempt_app, name="attempt")
app.add_typer(bench_app, name="bench")
app.add_typer(study_app, name="study")
app.command()(export.export)
app.command("import")(import_run.import_run)
app.command()(generate.generate)
app.command()(upcycle.upcycle)
app.command()(analyze.analyze)
app.command()(finetune.finetune)
app.command()(evaluate.evaluate)
app.command()(plan.plan)
app.command("mlflow-sync")(mlflow_sync.mlflow_sync)
app.command()(preflight.preflight)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if context.invoked_subcommand in RESULTS_ARE_FILES:
        forgive_lost_output()
    if version:
        print(__version__)
        raise typer.Exit()


@app.command()
def prepare(
    corpus: Annotated[
        str,
        typer.Argument(
            help="text: stdlib, text, enwik8, text8, wikitext-103 or lm1b; images: digits, cifar10 "
            "or images"
        ),
    ],
    out: Annotated[Path, typer.Option(help="new or empty directory, or an older corpus")],
    input: Annotated[
        list[Path] | None,
        typer.Option(
            help="text file(s), plain, gz, bz2, xz or zip; for a known corpus its archive or "
            "folder; of images their folder"
        ),
    ] = None,
    tokenizer: Annotated[str, typer.Option(help="byte, char, word or sentencepiece")] = "byte",
    vocab_size: Annotated[int | None, typer.Option(help="for word and sentencepiece")] = None,
    image_size: Annotated[
        int | None, typer.Option(help="for images: pixels of height and width")
    ] = None,
    download: Annotated[bool, typer.Option(help="fetch a known corpus, with checksum")] = False,
    overwrite: Annotated[
        bool, typer.Option(help="replace another corpus in --out when this is whole")
    ] = False,
) -> None:
    """Turn text into Megatron .bin/.idx files, or images into mapped arrays.

    Example: vqmoe prepare stdlib --out data/stdlib
    """
    if corpus in ("digits", "cifar10", "images"):
        of_text = [tokenizer != "byte", vocab_size is not None, download, overwrite]
        _prepare_images(corpus, out, input or [], image_size, has_text_options=any(of_text))
        return
    if image_size is not None:
        raise ValueError(f"--image-size is for images, and {corpus} is text; leave it out")
    from vqmoe_megatron.data.prepare import prepare_corpus

    found = prepare_corpus(corpus, out, input or [], tokenizer, vocab_size, download, overwrite)
    for name, split in found.splits.items():
        print(
            f"{name}: {split.num_tokens:,} tokens, {split.num_documents:,} documents, "
            f"{split.num_bytes:,} bytes"
        )


def _prepare_images(
    name: str, out: Path, inputs: list[Path], image_size: int | None, has_text_options: bool
) -> None:
    from vqmoe_megatron.data.prepare_images import prepare_images

    if has_text_options:
        raise ValueError(
            f"{name} is a set of images: --tokenizer, --vocab-size, --download and --overwrite are "
            "for text; leave them out"
        )
    found = prepare_images(name, out, inputs, image_size)
    size = f"{found.image_size} x {found.image_size} x {found.num_channels}"
    for split in found.splits.values():
        print(f"{split.name}: {split.num_images:,} images of {size}")


@app.command()
def pretrain(
    recipe: Annotated[
        Path, typer.Argument(help="YAML recipe, for instance recipes/quickstart.yaml")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, for instance vq.num_codes=512")
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="local ranks to start; default: the fewest the layout fits on"),
    ] = None,
) -> None:
    """Pretrain a model: joins torchrun's or srun's world, or starts --nproc local ranks.

    Example: vqmoe pretrain recipes/quickstart.yaml --nproc 2 train.output_dir=runs/short
    """
    check_versions()
    from vqmoe_megatron.runtime.world import choose_device, discover_rank

    config = load_recipe(recipe, overrides or [])
    variables = discover_rank()
    device, _ = choose_device(config.train.device)
    if variables.source == "single process":
        world_size = nproc or minimum_world_size(config)
    elif nproc is not None and nproc != variables.world_size:
        raise ValueError(
            f"--nproc {nproc}, but {variables.source} already started {variables.world_size} "
            "ranks; leave --nproc out"
        )
    else:
        world_size = variables.world_size

    if variables.world_size == 1 and world_size > 1:
        with _arguments_of_ranks(config, recipe, overrides or []) as arguments:
            raise typer.Exit(_start_local_ranks(config, arguments, world_size))

    from vqmoe_megatron.rundir.run_directory import RunDirectory, lock_patience_seconds
    from vqmoe_megatron.runtime.forked_children import end_forks_with_parent
    from vqmoe_megatron.runtime.meeting_place import MeetingPlace
    from vqmoe_megatron.train.preflight import check_parts, check_run
    from vqmoe_megatron.train.stop_requests import StopRequests

    check_layout(config, world_size, device)  # these are refused here, before the first write
    check_parts(config, device)
    if world_size > 1:
        MeetingPlace.from_environ(os.environ)
    run_dir, is_first = RunDirectory(Path(config.train.output_dir)), variables.rank == 0
    stop_requests = StopRequests()  # before the slow imports: a signal may come during them
    end_forks_with_parent()
    if is_first:
        run_dir.create()
    with run_dir.lock(lock_patience_seconds()) if is_first else contextlib.nullcontext():
        run = check_run(config, world_size, device, looks_for_checkpoint=is_first)
        try:
            quiet_known_messages()
            if device == "cpu":
                from vqmoe_megatron.runtime.cpu_compat import install_cpu_compat

                install_cpu_compat()
            from vqmoe_megatron.train.pretrain import pretrain as pretrain_rank

            code = pretrain_rank(run, variables, device, stop_requests)
        except BaseException as error:  # only of the imports: pretrain_rank records its own ends
            with contextlib.suppress(OSError, ValueError):  # the error itself says more
                if is_first:
                    run.run_dir.record_end(variables.rank, error)
            raise
    raise typer.Exit(code)


@contextlib.contextmanager
def _arguments_of_ranks(
    config: RunConfig, recipe: Path, overrides: list[str]
) -> Iterator[list[str]]:
    """What makes each rank read the same recipe; a pipe has been read, and is empty now."""
    if recipe.is_file():
        yield [str(recipe), *overrides]
        return
    with tempfile.TemporaryDirectory(prefix="vqmoe_recipe_") as folder:
        save_recipe(config, copy := Path(folder) / "recipe.yaml")
        yield [str(copy)]


def _start_local_ranks(config: RunConfig, arguments: list[str], world_size: int) -> int:
    """Refuse what can be refused, start the ranks, record how they failed; the exit code."""
    from vqmoe_megatron.launch.local_ranks import run_local_ranks
    from vqmoe_megatron.rundir.status import read_status
    from vqmoe_megatron.runtime.world import choose_device
    from vqmoe_megatron.train.preflight import check_run

    device, reason = choose_device(config.train.device)
    run = check_run(config, world_size, device)
    run.run_dir.lock().close()  # refused here, before ranks start; rank 0 will hold it
    print(f"starting {world_size} local ranks on {device} ({reason})", flush=True)
    ended = run_local_ranks(["pretrain", *arguments], world_size)
    if ended.failure is not None:
        try:
            with run.run_dir.lock(wait_seconds=0.0):  # taken: the directory is another run's
                run.run_dir.record_failure(
                    ended.failure,
                    is_first_cause=ended.was_killed,
                    is_refusal=ended.code == EXIT_USAGE,
                )
                known = read_status(run.run_dir.path)
                if ended.code != EXIT_USAGE and known is not None:  # a refusal has been said
                    # Last, behind what the other ranks said for want of the first one that failed.
                    print(f"error: the run failed: {known.reason}", file=sys.stderr)
        except (OSError, ValueError) as error:
            print(f"the failure was not recorded: {error}", file=sys.stderr)
    return ended.code


@app.command()
def doctor() -> None:
    """Show this machine's environment and which path each part takes, with reasons.

    Example: vqmoe doctor
    """
    if supported_version(TORCH) is None:
        check_versions()  # without it nothing can be looked at
    from vqmoe_megatron.runtime.doctor import print_doctor

    print_doctor()


def main() -> None:
    """Run the command line; a refused input is one message on stderr and exit code 2.

    A command whose output got lost has failed, unless its results are files.
    """
    protect_standard_streams()
    try:
        with one_line_interrupt():
            app()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except SystemExit as ended:
        if not ended.code and (problem := lost_output()) is not None:
            print(f"error: the output could not be written: {problem.strerror}", file=sys.stderr)
            sys.exit(EXIT_CRASH)
        raise
