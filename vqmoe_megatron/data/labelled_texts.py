"""Labelled texts from local files: sentences and their classes, every line checked.

    DIR/train.tsv                text and label; splits train, dev (or valid), test
        .csv .json .jsonl        the same in other forms
    DIR/train/pos/*.txt          IMDB as it is released: one text per file, one folder per class

- A table's first row may name its columns; then those named in ``TEXT_COLUMNS`` and
  ``LABEL_COLUMNS`` are read. Without such a row a table has two columns, text and label.
- In a .tsv quotes are text; a .csv is what Python's csv reads. A .jsonl has an object per line, a
  .json a list of objects.
- BANKING77's classes are the categories of its train split, in alphabetical order; the others' are
  fixed.
- Without a dev file every tenth text of train is held out for it.

Imports neither torch nor megatron, so that bad texts are refused before any rank starts.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vqmoe_megatron.config import FinetuneConfig

TEXT_COLUMNS = ("text", "sentence", "review")
LABEL_COLUMNS = ("label", "category", "sentiment")
SPLIT_NAMES = {"train": ("train",), "valid": ("dev", "valid", "validation"), "test": ("test",)}
SUFFIXES = (".tsv", ".csv", ".jsonl", ".json")
HELD_OUT_EVERY = 10  # texts of train, where there is no dev split
MAX_FIELD_CHARACTERS = 2**24
# What stands for a class, class 0 first; None: the categories of train.
CLASSES: dict[str, tuple[tuple[str, ...], ...] | None] = {
    "sst2": (("0", "negative"), ("1", "positive")),
    "sst5": (
        ("0", "very negative"),
        ("1", "negative"),
        ("2", "neutral"),
        ("3", "positive"),
        ("4", "very positive"),
    ),
    "imdb": (("neg", "negative", "0"), ("pos", "positive", "1")),
    "banking77": None,
}


@dataclass(frozen=True)
class LabelledText:
    """One text, its class, and where it was found."""

    text: str
    label: int
    origin: str  # file:line, or the file


@dataclass(frozen=True)
class LabelledTexts:
    """A data set: splits ``train``, ``valid`` and, where there is one, ``test``."""

    dataset: str
    splits: dict[str, list[LabelledText]]
    classes: tuple[str, ...]
    sha256: str  # of every file that was read
    notes: tuple[str, ...] = ()  # what was decided for the reader, in sentences


def load_labelled_texts(dataset: str, folder: Path) -> LabelledTexts:
    """Read a data set's folder.

    Raises:
        ValueError: for a missing split, and with file and line for a row without text or label, of
            other columns, or of a class that train does not have.
    """
    if dataset not in CLASSES:
        raise ValueError(f"data set {dataset!r} is unknown; choose one of {', '.join(CLASSES)}")
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no directory; name the folder that holds train.tsv or train/"
        )
    digest = hashlib.sha256()
    found: dict[str, list[tuple[str, str, str]]] = {}
    for split in SPLIT_NAMES:
        rows = _split_rows(folder, split, dataset, digest)
        if rows is not None:
            found[split] = rows
    if "train" not in found:
        names = ", ".join(f"train{suffix}" for suffix in SUFFIXES)
        raise ValueError(f"{folder} has no train split; looked for {names} and a folder train")
    if not found["train"]:
        raise ValueError(f"the train split of {folder} holds no text")
    words = CLASSES[dataset] or tuple((name,) for name in sorted({r[1] for r in found["train"]}))
    splits = {name: _labelled(rows, words) for name, rows in found.items()}
    notes = []
    if "valid" not in splits:
        train = splits["train"]
        splits["valid"] = train[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        splits["train"] = [t for n, t in enumerate(train, 1) if n % HELD_OUT_EVERY]
        notes.append(
            f"no dev split in {folder}: every {HELD_OUT_EVERY}th text of train is held out for it"
        )
    for name, texts in splits.items():
        if not texts:
            raise ValueError(f"the {name} split of {folder} holds no text")
    labels = {text.label for text in splits["train"]}
    if len(labels) < 2:
        (only,) = (words[label][0] for label in labels)
        raise ValueError(f"the train split of {folder} has one class, {only!r}; two needed")
    classes = tuple(names[0] for names in words)
    return LabelledTexts(dataset, splits, classes, digest.hexdigest(), tuple(notes))


def checked_texts(tune: FinetuneConfig) -> LabelledTexts:
    """Read the texts of a recipe's section ``finetune``.

    Raises:
        ValueError: for texts that are wrong, others than the recipe was made for, or of other
            classes than the model answers with.
    """
    texts = load_labelled_texts(str(tune.dataset), Path(str(tune.path)))
    if tune.sha256 is not None and texts.sha256 != tune.sha256:
        raise ValueError(
            f"the texts in {tune.path} have changed: sha256 {texts.sha256[:12]}, the recipe was "
            f"made for {tune.sha256[:12]}; bring them back, or start another fine-tuning"
        )
    if tune.classes is not None and list(texts.classes) != tune.classes:
        apart = sorted(set(texts.classes) ^ set(tune.classes))
        raise ValueError(
            f"the classes of {tune.path} are not those that the model answers with: "
            f"{', '.join(apart[:8]) or 'their order'} differ, {len(apart)} in all; name texts of "
            "the same classes"
        )
    if tune.num_classes != len(texts.classes):
        raise ValueError(
            f"finetune.num_classes={tune.num_classes}, but {tune.path} has {len(texts.classes)}"
        )
    return texts


def _labelled(
    rows: list[tuple[str, str, str]], words: tuple[tuple[str, ...], ...]
) -> list[LabelledText]:
    number = {word: index for index, names in enumerate(words) for word in names}
    texts = []
    for text, label, origin in rows:
        if label not in number:
            shown = ", ".join(names[0] for names in words[:8]) + (", ..." if len(words) > 8 else "")
            raise ValueError(f"{origin}: label {label!r} is none of this data set's: {shown}")
        texts.append(LabelledText(text, number[label], origin))
    return texts


def _split_rows(
    folder: Path, split: str, dataset: str, digest: hashlib._Hash
) -> list[tuple[str, str, str]] | None:
    """(text, label, origin) of a split's file or folder; None without one."""
    places = [folder / f"{name}{end}" for name in SPLIT_NAMES[split] for end in (*SUFFIXES, "")]
    there = [p for p in places if (p.is_file() if p.suffix in SUFFIXES else p.is_dir())]
    if len(there) > 1:
        raise ValueError(
            f"{folder} has several files for the split {split}: "
            f"{', '.join(p.name for p in there)}; leave one"
        )
    if not there:
        return None
    (path,) = there
    if path.is_dir():
        found = _folder_rows(path, dataset, digest)
    else:
        content = _read(path, digest, path.name)
        found = _json_rows(path, content) if "json" in path.suffix else _table_rows(path, content)
    return [_checked(*row) for row in found]


def _read(path: Path, digest: hashlib._Hash, name: str) -> str:
    """A file's text; ``digest`` is told its content and ``name``, which says split and class."""
    try:
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return content.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line} is not UTF-8; convert the file") from error


def _checked(text: object, label: object, origin: str) -> tuple[str, str, str]:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{origin}: the text is empty or no text; every row needs one")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON's escapes can say half a pair of surrogates
        raise ValueError(f"{origin}: the text is no Unicode text: {error.reason}") from error
    if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
        raise ValueError(f"{origin}: the label is missing; every row needs one")
    return text.strip(), str(label).strip(), origin


def _table_rows(path: Path, content: str) -> Iterator[tuple[str, str, str]]:
    is_csv = path.suffix == ".csv"
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    # Not splitlines: a text may hold what that takes for a line's end, such as U+2028 or U+0085.
    lines = list(io.StringIO(content, newline="")) if is_csv else content.split("\n")
    rows = csv.reader(lines, strict=True) if is_csv else (line.split("\t") for line in lines)
    columns, line = (0, 1, 2), 1  # text, label, number of columns
    try:
        for number, row in enumerate(rows):
            row = [field.removesuffix("\r") for field in row]
            origin, line = f"{path}:{line}", rows.line_num + 1 if is_csv else line + 1
            if not any(field.strip() for field in row):
                if number < len(lines) - 1 and not is_csv:
                    raise ValueError(f"{origin}: the line is empty; every row needs text and label")
                continue
            if number == 0 and (named := _named_columns(row, origin)) is not None:
                columns = named
                continue
            if len(row) != columns[2]:
                raise ValueError(
                    f"{origin}: {len(row)} columns instead of {columns[2]}; a table without a "
                    "first row of names has two, text and label"
                )
            yield row[columns[0]], row[columns[1]], origin
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: {error}; quote fields as CSV does") from error


def _named_columns(row: list[str], origin: str) -> tuple[int, int, int] | None:
    """Places of text and label, and the number of columns, of a row of names; None for data."""
    names = [name.strip().lower() for name in row]
    text = [n for n, name in enumerate(names) if name in TEXT_COLUMNS]
    label = [n for n, name in enumerate(names) if name in LABEL_COLUMNS]
    if len(text) == 1 and len(label) == 1:
        return text[0], label[0], len(row)
    if text or label:
        raise ValueError(
            f"{origin}: columns {', '.join(names)}; one of {', '.join(TEXT_COLUMNS)} and one of "
            f"{', '.join(LABEL_COLUMNS)} are needed"
        )
    return None


def _json_rows(path: Path, content: str) -> Iterator[tuple[object, object, str]]:
    if path.suffix == ".json":
        try:
            objects = json.loads(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; one object per line is .jsonl") from error
        if not isinstance(objects, list):
            raise ValueError(f"{path} must hold a list of objects")
        entries = [(one, f"{path}: entry {n}") for n, one in enumerate(objects, 1)]
    else:
        entries = []
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                try:
                    entries.append((json.loads(line), f"{path}:{number}"))
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: {error}") from error
    for one, origin in entries:
        if not isinstance(one, dict):
            raise ValueError(f"{origin}: an object with text and label is needed")
        yield _one_of(one, TEXT_COLUMNS, origin), _one_of(one, LABEL_COLUMNS, origin), origin


def _one_of(entry: dict[str, object], names: tuple[str, ...], origin: str) -> object:
    found = [name for name in names if name in entry]
    if len(found) != 1:
        raise ValueError(
            f"{origin}: one of {', '.join(names)} is needed; it has {', '.join(entry)}"
        )
    return entry[found[0]]


def _folder_rows(
    folder: Path, dataset: str, digest: hashlib._Hash
) -> Iterator[tuple[str, str, str]]:
    """One text per file below a folder of its class; folders of no class are passed over."""
    words = CLASSES[dataset]
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    if words is not None:  # the release of IMDB has train/unsup beside its classes
        known = {word for names in words for word in names}
        classes = [entry for entry in classes if entry.name in known]
    if not classes:
        raise ValueError(f"{folder} holds no folder of a class, such as pos and neg")
    for entry in classes:
        for path in sorted(entry.glob("*.txt")):
            name = f"{folder.name}/{entry.name}/{path.name}"
            yield _read(path, digest, name), entry.name, str(path)
