"""Captions of throughput and routing count the runs that have these figures."""

from written_study import write_study

from vqmoe_megatron.study.report.run_table import read_study
from vqmoe_megatron.study.report.series import split_series
from vqmoe_megatron.study.report.speed_sections import routing, speed_and_wire


def test_captions_count_the_seeds_that_are_drawn(tmp_path):
    diverged = {
        "experts4-vq-ranks1-seed2": 0
    }  # its speed and its routing are measured all the same
    directory = write_study(tmp_path / "s", sizes=(4, 8), routers=("vq",), diverged=diverged)
    study = read_study(directory, "CPU")
    series = split_series(study.rows)
    assert "mean over seeds (n = 2)" in speed_and_wire(study, series).plots[0].caption
    assert "over seeds (n = 2)" in routing(series).plots[0].caption
    study.rows[0].tokens_per_second = None
    assert "mean over seeds (n = 1 to 2)" in speed_and_wire(study, series).plots[0].caption
    for row in study.rows:
        row.tokens_per_second = None
    assert "mean over seeds (none measured)" in speed_and_wire(study, series).plots[0].caption
    study.rows[0].late["vq/dead_codes"] = float("nan")
    assert "over seeds (n = 1 to 2)" in routing(series).plots[0].caption
