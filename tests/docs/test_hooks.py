"""Links out of docs/ lead to pages of what they mean; the built site asks nobody for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs", reason="the extra docs is not installed: make docs")

import hooks  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = re.compile(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="?(?:https?:)?//[^>]*')


def led(text: str, uri: str) -> str:
    page = SimpleNamespace(file=SimpleNamespace(src_uri=uri))
    return hooks.on_page_markdown(text, page=page)


@pytest.mark.parametrize(
    ("text", "uri", "expected"),
    [
        ("[a](recipes.md#x)", "operations.md", "[a](recipes.md#x)"),
        ("[a](https://x.org/y.md)", "operations.md", "[a](https://x.org/y.md)"),
        ("[a](../CHANGELOG.md)", "experiments.md", "[a](repository/CHANGELOG.md)"),
        ("[a](../../benchmarks/wire.md)", "concepts/x.md", "[a](../repository/benchmarks/wire.md)"),
        ("[a](../recipes/parity.yaml)", "recipes.md", "[a](repository/recipes/parity.yaml.md)"),
        ("[a](../slurm/)", "operations.md", "a"),
        ("[a](layer.md)", "repository/benchmarks/code_space.md", "[a](layer.md)"),
        ("[a](docs/testing.md)", "repository/README.md", "[a](../testing.md)"),
    ],
)
def test_a_link_is_led_to_a_page(text: str, uri: str, expected: str) -> None:
    assert led(text, uri) == expected


def test_a_link_to_nothing_stays_for_mkdocs_to_refuse() -> None:
    assert led("[a](../not_there.md)", "operations.md") == "[a](../not_there.md)"


def test_a_listing_holds_the_file_and_its_name() -> None:
    text = hooks.content_of(ROOT / "recipes" / "parity.yaml")
    assert text.startswith("# parity.yaml\n\n`recipes/parity.yaml`\n\n````yaml\n")
    assert (ROOT / "recipes" / "parity.yaml").read_text("utf-8") in text


def test_roles_of_sphinx_are_taken_out() -> None:
    assert hooks.on_page_content("see :class:<code>~Codebook</code>") == "see <code>Codebook</code>"


@pytest.mark.full
def test_the_site_builds_without_a_warning_and_asks_nobody(tmp_path) -> None:
    pytest.importorskip("material", reason="the extra docs is not installed: make docs")
    pytest.importorskip("mkdocstrings", reason="the extra docs is not installed: make docs")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > 40
    ours = [page for page in pages if "studies" not in page.parts or page.name != "index.html"]
    assert [(page.name, OUTSIDE.findall(page.read_text("utf-8"))) for page in ours] == [
        (page.name, []) for page in ours
    ]
    keys = (tmp_path / "reference" / "recipe_keys.html").read_text("utf-8")
    assert "code_memory.num_rows" in keys
    layer = (tmp_path / "reference" / "layer.html").read_text("utf-8")
    assert "VQMoELayer" in layer and ":class:" not in layer
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(?:https?:)?//", style.read_text("utf-8")), style
