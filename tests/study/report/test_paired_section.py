"""The section on arms: verdicts, names of runs that are missing, costs; and when there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from paired_study import paired_study, plant, run_name
from written_study import write_study

from vqmoe_megatron.study.report.paired_section import against_baselines
from vqmoe_megatron.study.report.run_table import read_study
from vqmoe_megatron.study.report.series import split_series

BASE = (2.0, 2.5, 1.5, 3.0)


def section_of(study):
    return against_baselines(study, split_series(study.rows))


def columns(table, *names: str) -> list[list[str]]:
    places = [list(table.headings).index(name) for name in names]
    return [[line[place] for place in places] for line in table.lines]


@pytest.fixture
def study(tmp_path):
    return paired_study(tmp_path / "s", diverged={run_name(64, "vq", 4): 8}, baseline="smoe")


def test_verdicts_pairs_and_left_out_runs_stand_in_their_rows(study) -> None:
    plant(study, {(4, "smoe"): BASE, (4, "vq"): (1.9, 2.3, 1.3, 2.7), (4, "smoe_top2"): BASE})
    plant(study, {(64, "smoe"): BASE[:3], (64, "vq"): (2.1, 2.7, 1.7)})
    plant(study, {(64, "smoe_top2"): (2.5, 2.0, 1.5, 3.0)})
    section = section_of(study)
    paired, gains, costs = section.tables
    assert columns(paired, "where", "arm", "minus", "pairs n", "the arm is", "left out") == [
        ["experts 4", "smoe_top2", "smoe", "4", "not separated", ""],
        ["experts 4", "vq", "smoe", "4", "better", ""],
        ["experts 64", "smoe_top2", "smoe", "4", "not separated", ""],
        ["experts 64", "vq", "smoe", "3", "worse", "seed 4: experts64-vq-ranks1-seed4 diverged"],
    ]
    assert paired.lines[1][4:6] == ["-0.2000", "-0.3299 to -0.0701"]
    assert "1 pairs are left out, each named in its row" in section.paragraphs[0]
    assert columns(gains, "arm", "at", "pairs n", "the gain is", "left out")[1] == [
        "vq",
        "experts 64 minus experts 4",
        "3",
        "smaller",
        "seed 4: experts64-vq-ranks1-seed4 diverged",
    ]
    assert [line[:2] for line in costs.lines][:3] == [
        ["experts 4", "smoe"],
        ["experts 4", "smoe_top2"],
        ["experts 4", "vq"],
    ]
    by_arm = {line[1]: line for line in costs.lines[:3]}
    assert by_arm["smoe"][2] == by_arm["smoe_top2"][2]  # all parameters
    active = {arm: int(line[3].replace(",", "")) for arm, line in by_arm.items()}
    assert active["smoe_top2"] > active["smoe"]
    assert by_arm["smoe"][5] == "1.000" and float(by_arm["smoe_top2"][5]) > 1.1
    assert by_arm["smoe"][6] == "" and by_arm["vq"][6] == "1.000"


def test_equal_flops_says_what_pairs_share(study) -> None:
    assert "numbers of epochs are equal" not in section_of(study).paragraphs[0]
    said = section_of(replace(study, rule="equal_flops")).paragraphs[0]
    assert "The rule is equal FLOPs" in said and "numbers of epochs are equal" in said


def test_without_bits_per_byte_the_loss_decides(study) -> None:
    for row in study.rows:
        row.final_bits_per_byte = None
    paired, gains, _ = section_of(study).tables
    assert columns(paired, "bits/byte", "pairs n")[0] == ["", "4"]
    assert "change (nats per token)" in gains.headings


def test_a_baseline_is_that_of_the_file_that_is_asked_for(tmp_path) -> None:
    directory = write_study(tmp_path / "s", sizes=(4,), seeds=(1,), baseline="smoe")
    assert read_study(directory, "CPU").baselines == ("smoe",)
    path = tmp_path / "study.yaml"
    text = (directory / "study.yaml").read_text()
    path.write_text(text.replace("baseline: smoe", "baseline: [vq]"))
    study = read_study(path, "CPU")
    assert study.baselines == ("vq",)
    (line,) = section_of(study).tables[0].lines
    assert line[1:4] == ["smoe", "vq", "1"]
    path.write_text(text.replace("baseline: smoe", "baseline: vqq"))
    with pytest.raises(ValueError, match="'vqq' is no named value of the grid: did you mean vq"):
        section_of(read_study(path, "CPU"))


def test_a_study_without_arms_has_no_section_and_one_with_two_axes_of_words_says_so(
    tmp_path,
) -> None:
    directory = write_study(tmp_path / "s", sizes=(4,), seeds=(1,), routers=("vq",))
    study = read_study(directory, "CPU")
    assert section_of(study) is None
    study = read_study(write_study(tmp_path / "two", sizes=(4,), seeds=(1,)), "CPU")
    for row in study.rows:
        row.point["other"] = row.point["router"] + "_too"
    section = section_of(study)
    assert section.tables == () and "name one of them in study.baseline" in section.paragraphs[0]
