"""A study file: read whole, or refused with everything that is wrong and the nearest names."""

from __future__ import annotations

import os
import threading

import pytest

from vqmoe_megatron.config.recipe_text import MOST_BYTES
from vqmoe_megatron.study.study_file import read_study_file, study_section


def test_a_study_is_read(write_study, tmp_path) -> None:
    study = read_study_file(write_study())
    assert study.name == "tiny" and study.output_dir == tmp_path / "study"
    assert len(study.points) == 4 and study.num_ranks is None
    assert study.settings[-1] == "vq.num_codes=2 * experts"


def test_arms_may_be_mappings_and_have_settings_of_their_own_at_one_size(write_study) -> None:
    as_lists = read_study_file(write_study())
    path = write_study(
        study={"baseline": "smoe"},
        grid={"experts": [4, 8], "router": {"smoe": {"vq.path": "continuous"}, "vq": {}}},
        when=[{"router": "vq", "experts": 8, "set": {"optimizer.lr": 2e-3}}],
    )
    study = read_study_file(path)
    assert study.baselines == ("smoe",) and as_lists.baselines == ()
    assert [point.name for point in study.points] == [point.name for point in as_lists.points]
    assert study.points[0].overrides == as_lists.points[0].overrides
    assert study.points[1].overrides == ("model.num_moe_experts=4",)
    assert study.points[3].overrides == ("model.num_moe_experts=8", "optimizer.lr=0.002")


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
        ({"set": "vq.num_codes=4"}, "set must be a list of overrides.* or a mapping"),
        ({"study": {"baseline": "vqq"}}, "'vqq' is no named value of the grid: did you mean vq"),
        ({"study": {"baseline": ["vq", "vq"]}}, "study.baseline names an arm twice"),
        ({"when": [{"router": "vq", "set": {"train.output_dir": "x"}}]}, "the study itself sets"),
        ({"when": [{"router": "vq", "set": {"train.train_iters": 9}}]}, "rule: as_written"),
        ({"when": {"router": "vq"}}, "when must be a list of axes"),
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


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize("read", [read_study_file, study_section])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty: write sections .study, set, grid, exclude.*studies/stdlib_experts.yaml"),
        ("[]", "must hold sections .study.*not a list"),
        ("study: {\n", "not valid YAML: line 2"),
        ("#" * MOST_BYTES + "\n", f"cannot be read as a study: it is longer than {MOST_BYTES}"),
        (BOMB, "more than 10,000 values, its aliases written out"),
        ("\udcff", "cannot be read as a study: it is not text in UTF-8"),
    ],
    ids=("empty", "list", "cut", "long", "aliases", "bytes"),
)
def test_a_file_that_is_no_study_ends_in_one_line(tmp_path, read, content, says) -> None:
    path = tmp_path / "s.yaml"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=says) as refused:
        read(path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


@pytest.mark.parametrize("read", [read_study_file, study_section])
def test_an_endless_file_is_not_read_to_its_end(read, tmp_path) -> None:
    (tmp_path / "endless.yaml").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="cannot be read as a study: it is longer"):
        read(tmp_path / "endless.yaml")


def test_a_study_may_come_through_a_pipe(write_study, tmp_path) -> None:
    text = write_study().read_bytes()
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(text,), daemon=True)
    writer.start()
    assert len(read_study_file(tmp_path / "pipe").points) == 4
    writer.join(10)
    assert not writer.is_alive()


def test_the_section_alone_is_read_as_it_stands(write_study, tmp_path) -> None:
    assert study_section(write_study())["name"] == "tiny"
    (tmp_path / "recipe.yaml").write_text("study: 3\n")
    with pytest.raises(ValueError, match="is not a study: it has no section `study:`"):
        study_section(tmp_path / "recipe.yaml")
