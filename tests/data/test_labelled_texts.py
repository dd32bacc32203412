"""Labelled texts in every form they lie in, and what is wrong with a line, by file and line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vqmoe_megatron.config import FinetuneConfig
from vqmoe_megatron.data.labelled_texts import checked_texts, load_labelled_texts

ROWS = [("a good film", "1"), ('"bad" , they say', "0"), ("fine", "1")]
EXPECTED = [(text, int(label)) for text, label in ROWS]


def csv_field(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


FORMS = {
    "train.tsv": "\n".join("\t".join(row) for row in ROWS) + "\n",
    "named/train.tsv": "label\tsentence\n" + "\n".join(f"{b}\t{a}" for a, b in ROWS),
    "crlf/train.tsv": "\r\n".join("\t".join(row) for row in ROWS) + "\r\n",
    "train.csv": "text,label\n" + "\n".join(f"{csv_field(a)},{b}" for a, b in ROWS),
    "train.jsonl": "\n".join(json.dumps({"text": a, "label": b}) for a, b in ROWS),
    "train.json": json.dumps([{"sentence": a, "label": int(b)} for a, b in ROWS]),
}


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, "utf-8")
    return folder


def found(texts) -> list[tuple[str, int]]:
    return [(text.text, text.label) for text in texts]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same(form: str, tmp_path) -> None:
    name = Path(form).name
    both = {name: FORMS[form], name.replace("train", "dev"): FORMS[form]}
    texts = load_labelled_texts("sst2", written(tmp_path, both))
    assert found(texts.splits["train"]) == found(texts.splits["valid"]) == EXPECTED
    assert set(texts.splits) == {"train", "valid"}
    assert texts.notes == ()


def test_imdb_is_folders_of_files_and_holds_out_a_tenth(tmp_path) -> None:
    files = {f"train/{c}/{n}_7.txt": f"{c} {n}" for c in ("neg", "pos") for n in range(10)}
    files |= {"test/pos/1_8.txt": "nice", "test/neg/2_1.txt": "no", "train/unsup/1_0.txt": "x"}
    texts = load_labelled_texts("imdb", written(tmp_path, files))
    assert texts.classes == ("neg", "pos")
    assert found(texts.splits["test"]) == [("no", 0), ("nice", 1)]
    assert found(texts.splits["valid"]) == [("neg 9", 0), ("pos 9", 1)]
    assert len(texts.splits["train"]) == 18
    assert texts.notes == (
        f"no dev split in {tmp_path}: every 10th text of train is held out for it",
    )


def test_banking77_s_classes_are_the_categories_of_train(tmp_path) -> None:
    rows = 'text,category\n"Where is my card?\nPlease",card_arrival\nTop up failed,topping_up\n'
    texts = load_labelled_texts(
        "banking77", written(tmp_path, {"train.csv": rows, "dev.csv": rows})
    )
    assert texts.classes == ("card_arrival", "topping_up")
    assert texts.splits["train"][1].origin == f"{tmp_path / 'train.csv'}:4"


def test_texts_of_other_classes_than_the_model_s_are_refused(tmp_path) -> None:
    """As many, so their number does not tell; class 0 would be another one."""
    rows = "text,category\nWhere is it?,card_arrival\nTop up failed,topping_up\n"
    folder = written(tmp_path, {"train.csv": rows, "dev.csv": rows})
    tune = FinetuneConfig("banking77", str(folder), num_classes=2)
    assert checked_texts(tune).classes == ("card_arrival", "topping_up")
    checked_texts(replace(tune, classes=["card_arrival", "topping_up"]))
    for others, said in (
        (["age_limit", "card_arrival"], "answers with: age_limit, topping_up differ, 2 in all"),
        (["card_arrival"], "answers with: topping_up differ, 1 in all"),
        (["topping_up", "card_arrival"], "answers with: their order differ"),
    ):
        with pytest.raises(ValueError, match=said):
            checked_texts(replace(tune, classes=others))


def test_the_digest_is_of_every_file(tmp_path) -> None:
    folder = written(tmp_path, {"train.tsv": FORMS["train.tsv"], "dev.tsv": FORMS["train.tsv"]})
    before = load_labelled_texts("sst2", folder).sha256
    assert load_labelled_texts("sst2", folder).sha256 == before
    (folder / "dev.tsv").write_text("other\t1\n")
    assert load_labelled_texts("sst2", folder).sha256 != before


def test_a_line_of_csv_ends_where_csv_ends_it(tmp_path) -> None:
    rows = "text,label\r\na\u2028b,1\r\nc\x85d\x0be,0\r\n"
    texts = load_labelled_texts("sst2", written(tmp_path, {"train.csv": rows, "dev.csv": rows}))
    assert found(texts.splits["train"]) == [("a\u2028b", 1), ("c\x85d\x0be", 0)]
    assert texts.splits["train"][1].origin == f"{tmp_path / 'train.csv'}:3"


def test_the_digest_is_of_the_classes_of_files_too(tmp_path) -> None:
    files = {f"{split}/neg/0_1.txt": "no" for split in ("train", "dev")}
    files |= {f"{split}/pos/{n}_9.txt": "yes" for split in ("train", "dev") for n in (1, 2)}
    folder = written(tmp_path, files)
    before = load_labelled_texts("imdb", folder)
    (folder / "train/pos/1_9.txt").rename(folder / "train/neg/1_9.txt")
    after = load_labelled_texts("imdb", folder)  # the same files in the same order
    assert [t.text for t in after.splits["train"]] == [t.text for t in before.splits["train"]]
    assert after.sha256 != before.sha256


GOOD = "good\t1\nbad\t0\n"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"train.tsv": "good\t1\nbad\n"}, "train.tsv:2: 1 columns instead of 2"),
        ({"train.tsv": "good\t1\nbad\t\n"}, "train.tsv:2: the label is missing"),
        ({"train.tsv": "good\t1\n \t0\n"}, "train.tsv:2: the text is empty"),
        ({"train.tsv": "good\t1\n\nbad\t0\n"}, "train.tsv:2: the line is empty"),
        ({"train.tsv": "good\t1\tx\n"}, "train.tsv:1: 3 columns instead of 2"),
        ({"train.tsv": "index\tsentence\n0\tgood\n"}, "train.tsv:1: columns index, sentence; one"),
        ({"train.tsv": GOOD, "dev.tsv": "fine\t1\nodd\t7\n"}, "dev.tsv:2: label '7' is none of"),
        ({"train.csv": 'text,label\n"good,1\n'}, "train.csv:2: unexpected end of data"),
        ({"train.jsonl": '{"text": "a", "label": 1}\n{"text": "b"}\n'}, "train.jsonl:2: one of"),
        ({"train.jsonl": '{"text": "a", "label": 1}\n{"te\n'}, "train.jsonl:2: "),
        ({"train.jsonl": "[1]\n"}, "train.jsonl:1: an object"),
        ({"train.json": '[{"text": 3, "label": 1}]'}, "train.json: entry 1: the text is empty"),
        ({"train.json": "{}"}, "must hold a list"),
        ({"train.tsv": GOOD, "train.csv": "text,label\ngood,1\n"}, "several files"),
        ({"dev.tsv": GOOD}, "has no train split; looked for train.tsv"),
        ({"train.jsonl": '{"text": "a\\ud800", "label": 1}\n'}, "train.jsonl:1: the text is no"),
        ({"train.tsv": ""}, "the train split"),
        ({"train.tsv": "good\t1\nfine\t1\n", "dev.tsv": GOOD}, "has one class, '1'; two needed"),
        ({"train/other/1.txt": "a"}, "holds no folder of a class"),
    ],
)
def test_what_is_wrong_is_said_by_file_and_line(files, said, tmp_path) -> None:
    with pytest.raises(ValueError) as refused:
        load_labelled_texts("sst2", written(tmp_path, files))
    assert said in str(refused.value)


def test_other_bytes_than_utf_8_are_refused_by_their_line(tmp_path) -> None:
    (tmp_path / "train.tsv").write_bytes(b"good\t1\nbl\xe9\t0\n")
    with pytest.raises(ValueError, match=r"train.tsv:2 is not UTF-8"):
        load_labelled_texts("sst2", tmp_path)


def test_places_and_data_sets_that_do_not_exist(tmp_path) -> None:
    with pytest.raises(ValueError, match="is no directory"):
        load_labelled_texts("sst2", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="choose one of sst2, sst5, imdb, banking77"):
        load_labelled_texts("cola", tmp_path)
    table = "text,category\na,x\nb,x\n"
    only = written(tmp_path / "one", {"train.csv": table, "dev.csv": table})
    with pytest.raises(ValueError, match="has one class, 'x'"):
        load_labelled_texts("banking77", only)
    empty = written(tmp_path / "empty", {"train.csv": "text,category\n", "dev.csv": table})
    with pytest.raises(ValueError, match="the train split of .* holds no text"):
        load_labelled_texts("banking77", empty)
