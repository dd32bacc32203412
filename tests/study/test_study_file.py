"""A study file: read whole, or refused with everything that is wrong and the nearest names."""

from __future__ import annotations

import pytest

from vqmoe_megatron.study.study_file import read_study_file


def test_a_study_is_read(write_study, tmp_path) -> None:
    study = read_study_file(write_study())
    assert study.name == "tiny" and study.output_dir == tmp_path / "study"
    assert len(study.points) == 4 and study.num_ranks is None
    assert study.settings[-1] == "vq.num_codes=2 * experts"


def test_everything_wrong_is_said_at_once(write_study) -> None:
    path = write_study(
        study={"output_dirr": "x", "rule": "equal_token", "num_ranks": "two"},
        gird={"experts": [4]},
        grid={"expert": [4]},
    )
    with pytest.raises(ValueError) as refused:
        read_study_file(path)
    said = str(refused.value)
    assert said.startswith(f"5 problems in study {path}:")
    assert "unknown section 'gird': did you mean grid?" in said
    assert "unknown key 'study.output_dirr': did you mean study.output_dir?" in said
    assert "equal_tokens, equal_flops, as_written" in said
    assert "study.num_ranks: expected int, got 'two'" in said
    assert "unknown axis grid.expert: did you mean experts?" in said


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"study": {"name": "a b"}}, "study.name: letters"),
        ({"study": {"num_ranks": 0}}, "study.num_ranks=0 must be at least 1"),
        ({"more": ["train.output_dir=x"]}, "the study itself sets train.output_dir"),
        ({"more": ["study.num_ranks=2"]}, "belongs to the section study"),
        ({"grid": {"train.train_iters": [1, 2]}}, "rule: as_written"),
        ({"set": {"vq.num_codes": 4}}, "set must be a list of overrides"),
        ({"exclude": [{"seed": [1, 2]}], "grid": {"seed": [1, 2]}}, "leaves no run"),
    ],
)
def test_refused(changes, says, write_study) -> None:
    with pytest.raises(ValueError, match=says):
        read_study_file(write_study(**changes))


def test_missing_sections_and_files_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_study_file(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="is a folder, not a study file"):
        read_study_file(tmp_path)
    (tmp_path / "empty.yaml").write_text("{}\n")
    with pytest.raises(ValueError, match="section study is missing"):
        read_study_file(tmp_path / "empty.yaml")
    (tmp_path / "bad.yaml").write_text("study: {\n")
    with pytest.raises(ValueError, match="not valid YAML: line 2"):
        read_study_file(tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match="none.yaml does not exist.*bad.yaml"):
        read_study_file(tmp_path / "none.yaml")
