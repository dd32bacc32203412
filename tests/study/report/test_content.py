"""The head of a page, and the order of its sections."""

from datetime import datetime, timezone

from written_study import write_study

from vqmoe_megatron.bench.origin import origin
from vqmoe_megatron.study.report.content import PLOT_NAMES, build_page
from vqmoe_megatron.study.report.run_table import read_study


def test_what_is_left_out_stands_before_what_is_averaged(tmp_path):
    directory = write_study(
        tmp_path / "s",
        sizes=(4, 8),
        routers=("vq",),
        states={"experts4-vq-ranks1-seed1": ("failed", 9)},
        diverged={"experts8-vq-ranks1-seed2": 16},
    )
    page = build_page(read_study(directory, "CPU"), origin(), datetime.now(timezone.utc))
    left_out = "3 finished (1 of them without a finite validation loss), 1 not"
    assert dict(page.facts)["Runs"] == left_out
    assert [section.title for section in page.sections][:3] == [
        "Runs that have not finished",
        "Finished runs without a finite validation loss",
        "Loss against experts",
    ]
    assert page.sections[-1].title == "All runs"
    drawn = [plot.file_name for section in page.sections for plot in section.plots]
    assert tuple(drawn) == PLOT_NAMES
