"""Where a result comes from, in one wording."""

from __future__ import annotations

import subprocess

import pytest

from vqmoe_megatron.bench import origin as origins
from vqmoe_megatron.bench.origin import commit_in_words, origin


@pytest.mark.parametrize(
    ("commit", "changed", "words"),
    [
        ("0123456789abcdef", False, "0123456789ab"),
        ("0123456789abcdef", True, "0123456789ab with uncommitted changes"),
        (None, None, "unknown"),
    ],
)
def test_a_commit_in_words(commit, changed, words) -> None:
    assert commit_in_words({"commit": commit, "uncommitted_changes": changed}) == words


def test_changes_of_the_package_and_of_the_recipes_beside_it_are_seen(
    tmp_path, monkeypatch
) -> None:
    package = tmp_path / "vqmoe_megatron"
    monkeypatch.setattr(origins, "PACKAGE", package)
    for name in ("vqmoe_megatron/code.py", "recipes/a.yaml", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    assert origin()["commit"] is None and origin()["uncommitted_changes"] is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "README.md").write_text("2")
    assert len(origin()["commit"]) == 40 and origin()["uncommitted_changes"] is False
    for name in ("recipes/a.yaml", "vqmoe_megatron/code.py"):
        (tmp_path / name).write_text("2")
        assert origin()["uncommitted_changes"] is True
        (tmp_path / name).write_text("1")
