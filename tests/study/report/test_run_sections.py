"""Finished runs without a loss are announced; the others are not."""

import pytest
from written_study import write_study

from vqmoe_megatron.study.report.run_sections import runs_without_loss
from vqmoe_megatron.study.report.run_table import read_study

DIVERGED = "experts8-vq-ranks1-seed2"


@pytest.fixture
def study(tmp_path):
    states = {"experts4-vq-ranks1-seed2": ("failed", 20)}
    directory = write_study(
        tmp_path / "s", sizes=(4, 8), routers=("vq",), states=states, diverged={DIVERGED: 16}
    )
    return read_study(directory, "CPU")


def test_finished_runs_that_diverged_are_named(study):
    section = runs_without_loss(study)
    assert section.tables[0].lines == [[DIVERGED, "nan", "12"]]
    (said,) = section.paragraphs
    assert said.startswith("1 of 3 finished runs have no finite validation loss at their end")
    assert "no mean or fit of the loss" in said and "is then too good" in said


def test_finished_runs_that_were_never_evaluated_are_named(study):
    row = study.finished[0]
    row.final_val_loss = None
    row.records = [{"iteration": 40, "consumed_tokens": 10240}]
    assert [row.name, "none", ""] in runs_without_loss(study).tables[0].lines


def test_there_is_no_section_without_such_runs(study):
    study.rows[:] = [row for row in study.rows if row.name != DIVERGED]
    assert runs_without_loss(study) is None
