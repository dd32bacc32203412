"""What MkDocs asks while it builds the site: pages that are made, links into the repository.

Documents link to recipes, benchmarks and sources beside ``docs/``, which MkDocs does not publish.
Each file that a page links to becomes a page below ``repository/``: Markdown as it is, other text
as a listing. So nothing is copied by hand, and such a link is checked as any other.
"""

from __future__ import annotations

import os.path
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
MIRROR = "repository/"
sys.path[:0] = [str(ROOT), str(DOCS / "site")]

import command_pages  # noqa: E402
import recipe_keys  # noqa: E402

MADE = {
    "reference/recipe_keys.md": recipe_keys.page,
    "reference/commands.md": command_pages.command_page,
    "reference/metrics.md": command_pages.metric_page,
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash"}
ROLE = re.compile(r":\w+:(<code>)~?")  # Sphinx's, in docstrings: :class:`Codebook`


def place_of(uri: str) -> Path:
    """The file in the repository that a page shows."""
    if uri.startswith(MIRROR):
        name = uri.removeprefix(MIRROR)
        is_listing = not (ROOT / name).is_file()
        return ROOT / (name.removesuffix(".md") if is_listing else name)
    return DOCS / uri


def mirrored(path: Path) -> str | None:
    """The page of a file of the repository; None where there is none: outside, or a folder."""
    if not path.is_file() or not path.is_relative_to(ROOT):
        return None
    name = path.relative_to(ROOT).as_posix()
    return MIRROR + (name if path.suffix == ".md" else f"{name}.md")


def target_of(uri: str, link: str) -> Path:
    """The file that a link of a page leads to."""
    return Path(os.path.normpath(place_of(uri).parent / link))


def content_of(path: Path) -> str:
    """A file of the repository as Markdown."""
    text = path.read_text("utf-8")
    if path.suffix == ".md":
        return text
    language = LANGUAGES.get(path.suffix, "text")
    name = path.relative_to(ROOT).as_posix()
    return f"# {path.name}\n\n`{name}`\n\n````{language}\n{text}````\n"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made, then those of linked files, and of files that these link to."""
    for uri, made in MADE.items():
        files.append(File.generated(config, uri, content=made()))
    waiting = [file.src_uri for file in files.documentation_pages()]
    while waiting:
        uri = waiting.pop()
        for _, _, link, _ in LINK.findall(files.get_file_from_path(uri).content_string):
            path = target_of(uri, link)
            page = None if path.is_relative_to(DOCS) else mirrored(path)
            if page and files.get_file_from_path(page) is None:
                files.append(File.generated(config, page, content=content_of(path)))
                waiting.append(page)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links out of ``docs/`` to the pages of what they mean; of folders the text is left."""
    uri = page.file.src_uri

    def led(found: re.Match[str]) -> str:
        image, text, link, anchor = found.groups()
        path = target_of(uri, link)
        if image or (path.is_relative_to(DOCS) and not uri.startswith(MIRROR)):
            return found[0]
        if path.is_relative_to(DOCS):
            wanted = path.relative_to(DOCS).as_posix()
        elif path.is_dir():
            return text
        else:
            wanted = mirrored(path) or link
        there = os.path.relpath(wanted, os.path.dirname(uri))
        return f"[{text}]({there}{anchor or ''})"

    return LINK.sub(led, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Take the names of Sphinx's roles out of docstrings."""
    return ROLE.sub(r"\1", html)
