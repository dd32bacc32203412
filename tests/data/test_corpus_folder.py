"""prepare takes a folder only where nothing of anyone is lost, and swaps corpora whole."""

import errno
import itertools
import json
import multiprocessing
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vqmoe_megatron.data import corpus_folder, prepare
from vqmoe_megatron.data.corpus import COMPLETE_DIR, current_corpus, load_corpus
from vqmoe_megatron.data.corpus_folder import BUILDING_DIR, LOCK_FILE
from vqmoe_megatron.data.evaluation_windows import EvaluationWindows
from vqmoe_megatron.data.indexed_writer import IndexedWriter
from vqmoe_megatron.data.prepare import prepare_corpus

TEXT = b"".join(b"line %d of a text\n" % number for number in range(300))


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """Flushing to a busy disk takes longer than all the rest, and no test here cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "mine.txt"
    path.write_bytes(TEXT)
    return path


@pytest.fixture
def old(tmp_path, text) -> Path:
    """A corpus of train and valid, with a user's own files beside it."""
    out = tmp_path / "data"
    prepare_corpus("text", out, [text, text])
    (out / "notes.md").write_text("mine")
    (out / "cache" / "downloads").mkdir(parents=True)
    (out / "cache" / "downloads" / "x").write_text("mine")
    return out


def tree(folder: Path) -> dict[str, object]:
    """Every name below ``folder`` but the lock's, with its content or target."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = os.readlink(path)
        elif path.name != LOCK_FILE:
            content = path.read_bytes() if path.is_file() else None
            found[str(path.relative_to(folder))] = content
    return found


FOREIGN = {
    "a user's cache": {"cache/download.bin": "precious"},
    "another tokenizer": {"tokenizer.json": "{}"},
    "nanoGPT's names": {"train.bin": "mine", "valid.bin": "mine"},
    "a corpus.json of another program": {"corpus.json": '{"name": "brown"}', "train.bin": "mine"},
    "a corpus.json that is no object": {"corpus.json": "[]"},
    "a corpus.json that is no JSON": {"corpus.json": "once upon a time"},
    "a corpus.json that lacks the format": {
        "corpus.json": '{"splits": {"train": {}}, "tokenizer": {"file": null}}'
    },
    "anything else": {"thesis.tex": "mine"},
    "a hidden file": {".env": "mine"},
    "the result of a run": {"metrics.jsonl": "", "checkpoints/iter_0000001/x": "mine"},
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN.keys())
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_corpus_is_left_as_it_is(tmp_path, text, files, overwrite):
    out = tmp_path / "proj"
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(content)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="choose a(nother|  ?new) (--out|directory)|choose a new"):
        prepare_corpus("text", out, [text], overwrite=overwrite)
    assert tree(tmp_path) == before and not (out / LOCK_FILE).exists()


WORK_NAMES_OF_OTHERS = {
    "a folder of the building's name": {f"{BUILDING_DIR}/corpus/thesis.tex": "mine"},
    "a file of the building's name": {BUILDING_DIR: "mine"},
    "a folder of the new corpus's name": {f"{COMPLETE_DIR}/thesis.tex": "mine"},
    "a file of the new corpus's name": {COMPLETE_DIR: "mine"},
    "a lock with content": {LOCK_FILE: "mine"},
}


@pytest.mark.parametrize("files", WORK_NAMES_OF_OTHERS.values(), ids=WORK_NAMES_OF_OTHERS.keys())
@pytest.mark.parametrize("is_corpus", [False, True])
def test_a_work_name_that_is_someones_own_is_left_as_it_is(tmp_path, text, files, is_corpus):
    out = tmp_path / "proj"
    if is_corpus:
        prepare_corpus("text", out, [text])
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(content)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="vqmoe prepare did not write it"):
        prepare_corpus("text", out, [text], "char", overwrite=True)
    assert tree(tmp_path) == before
    assert all((out / name).read_text() == content for name, content in files.items())


def test_a_new_corpus_with_a_file_of_anothers_beside_it_is_left_as_it_is(tmp_path, text):
    prepare_corpus("text", tmp_path / "proj", [text])
    prepare_corpus("text", tmp_path / "proj" / COMPLETE_DIR, [text], "char")
    (tmp_path / "proj" / COMPLETE_DIR / LOCK_FILE).unlink()
    (tmp_path / "proj" / COMPLETE_DIR / "notes.md").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="vqmoe prepare did not write it"):
        prepare_corpus("text", tmp_path / "proj", [text], overwrite=True)
    assert tree(tmp_path) == before


def test_a_building_folder_half_removed_is_still_ours(tmp_path, text, monkeypatch):
    def killed(path, **options):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(corpus_folder.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus("text", out, [text])
    assert [path.name for path in (out / BUILDING_DIR).iterdir()] != []
    prepare_corpus("text", out, [text], overwrite=True)
    assert not (out / BUILDING_DIR).exists()


@pytest.mark.parametrize("kind", ["file", "dangling link", "link to a file", "below a file"])
def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path, text, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "dangling link":
        out.symlink_to(tmp_path / "nowhere")
    elif kind == "link to a file":
        out.symlink_to(text)
    else:
        out = text / "out"
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="is no directory|cannot prepare a corpus in"):
        prepare_corpus("text", out, [text], overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["train.bin", "valid.bin", "test.idx", "tokenizer.model"])
@pytest.mark.parametrize("link", ["itself", "symbolic link", "hard link"])
def test_an_input_that_is_an_output_is_refused(tmp_path, name, link):
    out = tmp_path / "n"
    out.mkdir()
    (out / name).write_bytes(TEXT)
    given = out / name
    if link == "symbolic link":
        given = tmp_path / "given"
        given.symlink_to(out / name)
    elif link == "hard link":
        given = tmp_path / "given"
        os.link(out / name, given)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=f"{name}, which prepare would write"):
        prepare_corpus("text", out, [given, given])
    assert tree(tmp_path) == before


def test_a_corpus_is_not_rebuilt_from_itself(tmp_path, old):
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="train.bin, which prepare would write"):
        prepare_corpus("text", old, [old / "train.bin"], overwrite=True)
    (old / BUILDING_DIR).mkdir()
    (old / BUILDING_DIR / "mine.txt").write_bytes(TEXT)
    with pytest.raises(ValueError, match="lies in a folder that prepare removes"):
        prepare_corpus("text", old, [old / BUILDING_DIR / "mine.txt"], overwrite=True)
    assert {**before, BUILDING_DIR: None}.keys() < {**tree(tmp_path), BUILDING_DIR: None}.keys()


def test_the_input_may_lie_in_a_new_corpus_folder(tmp_path):
    (tmp_path / "mine.txt").write_bytes(TEXT)
    prepare_corpus("text", tmp_path, [tmp_path / "mine.txt"])
    prepare_corpus("text", tmp_path, [tmp_path / "mine.txt"], "char", overwrite=True)
    assert (tmp_path / "mine.txt").read_bytes() == TEXT


def test_foreign_files_beside_a_corpus_outlive_its_replacement(old, text):
    corpus = prepare_corpus("text", old, [text, text], "char", overwrite=True)
    assert corpus.tokenizer["kind"] == "char" and load_corpus(old) == corpus
    assert (old / "notes.md").read_text() == (old / "cache/downloads/x").read_text() == "mine"
    assert not (old / BUILDING_DIR).exists()


@pytest.mark.parametrize(
    ("name", "inputs", "tokenizer"), [("test.bin", 3, "byte"), ("tokenizer.json", 2, "char")]
)
def test_a_foreign_file_with_a_name_of_the_new_corpus_is_refused(
    old, text, name, inputs, tokenizer
):
    (old / name).write_text("mine")
    before = tree(old)
    with pytest.raises(ValueError, match=f"{name} is there already, and vqmoe prepare did not"):
        prepare_corpus("text", old, [text] * inputs, tokenizer, overwrite=True)
    assert tree(old) == before


def test_a_link_to_a_corpus_is_followed_and_stays(tmp_path, old, text):
    link = tmp_path / "link"
    link.symlink_to(old)
    corpus = prepare_corpus("text", link, [text, text], "char", overwrite=True)
    assert link.is_symlink() and load_corpus(old).fingerprint == corpus.fingerprint


def test_a_listed_file_that_is_a_link_elsewhere_is_replaced_and_its_target_stays(
    tmp_path, old, text
):
    (old / "train.bin").rename(tmp_path / "large")
    (old / "train.bin").symlink_to(tmp_path / "large")
    prepare_corpus("text", old, [text, text], "char", overwrite=True)
    assert (tmp_path / "large").read_bytes() == TEXT and not (old / "train.bin").is_symlink()


FAILURES = ["not UTF-8", "vocabulary", "blank", "missing", "cut archive", "full", "limit", "stop"]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("is_new", [False, True])
def test_a_failed_prepare_changes_nothing(tmp_path, old, text, monkeypatch, failure, is_new):
    inputs, tokenizer, vocab_size = [text, text], "char", None
    raised: type[BaseException] = ValueError
    if failure == "not UTF-8":
        (tmp_path / "bad").write_bytes(TEXT * 50 + b"\xff\n" + TEXT)
        inputs = [tmp_path / "bad"]
    elif failure == "vocabulary":
        tokenizer, vocab_size = "sentencepiece", 50_000
    elif failure == "blank":
        (tmp_path / "blank").write_bytes(b" " * 100)
        inputs, tokenizer = [text, tmp_path / "blank"], "word"
    elif failure == "missing":
        inputs = [tmp_path / "no"]
    elif failure == "cut archive":
        (tmp_path / "cut.gz").write_bytes(b"\x1f\x8b\x08" + bytes(7) + b"\x01")
        inputs = [tmp_path / "cut.gz"]
    elif failure == "full":

        def full(self, ids):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(IndexedWriter, "write", full)
    elif failure == "stop":
        raised = KeyboardInterrupt

        def stop(self):
            raise KeyboardInterrupt

        monkeypatch.setattr(IndexedWriter, "end_document", stop)
    out = tmp_path / "new" / "folder" if is_new else old
    before = tree(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if failure == "limit":  # a real refusal of the file system, in the middle of train.bin
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(TEXT) // 2, hard))
        with pytest.raises(raised):
            prepare_corpus("text", out, inputs, tokenizer, vocab_size, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tree(tmp_path) == before
    monkeypatch.undo()
    prepare_corpus("text", out, [text, text], "char", overwrite=True)


# Forks a prepare per file-system call that it makes in DIR and ends it in front of that call, with
# nothing cleaned up. After each the old or the new corpus must be whole, and the next one succeed.
KILLED_EVERYWHERE = """
import os, shutil, sys
from pathlib import Path
from vqmoe_megatron.data.corpus import load_corpus
from vqmoe_megatron.data.prepare import prepare_corpus

os.fsync = lambda descriptor: None  # a kill loses nothing that was written
root, case = Path(sys.argv[1]), sys.argv[2]
start, out, text = root / "start", root / "out", root / "mine.txt"
EVENTS = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
countdown = None

def count(event, arguments):
    global countdown
    if countdown is None or event not in EVENTS:
        return
    if isinstance(arguments[0], (str, os.PathLike)) and str(root) in str(arguments[0]):
        countdown -= 1
        if countdown < 0:
            os._exit(9)

sys.addaudithook(count)

def child(action):
    pid = os.fork()
    if not pid:
        try:
            sys.stdout = open(os.devnull, "w")
            action()
        except BaseException as error:
            print(f"{error!r}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def prepare():
    kind = "char" if case == "to a tokenizer" else "byte"
    number = 3 if case == "to three splits" else 2
    prepare_corpus("text", out, [text] * number, kind, overwrite=True)

def whole(corpus):
    return corpus.tokenizer["kind"], [
        (name, split.bin_path.read_bytes()) for name, split in corpus.splits.items()
    ]

def killed(after):
    global countdown
    countdown = after
    prepare()

def reset():
    shutil.rmtree(out, ignore_errors=True)
    if start.exists():
        shutil.copytree(start, out)

reset()
old = whole(load_corpus(out)) if start.exists() else None
assert child(prepare) == 0
new, entries = whole(load_corpus(out)), sorted(os.listdir(out))
seen = []
for number in range(1000):
    reset()
    code = child(lambda: killed(number))
    if code == 0:
        break
    assert code == 9, code
    try:
        found = whole(load_corpus(out))
    except ValueError as error:
        assert old is None and "vqmoe prepare" in str(error), (number, error)
        found = None
    assert found in (old, new), number
    seen.append("new" if found == new else "old")
    for name in ("notes.md", "cache/downloads/x"):
        assert old is None or (out / name).read_text() == "mine", number
    assert child(prepare) == 0, number
    assert whole(load_corpus(out)) == new and sorted(os.listdir(out)) == entries, number
first = seen.index("new")
assert set(seen[:first]) == {"old"} and set(seen[first:]) == {"new"}, seen
print(len(seen), first)
"""


@pytest.mark.parametrize(
    "case", ["a first corpus", "to three splits", "to a tokenizer", "from a tokenizer"]
)
def test_killed_at_any_call_the_old_or_the_new_corpus_is_whole(tmp_path, case):
    text = tmp_path / "mine.txt"
    text.write_bytes(TEXT)
    if case != "a first corpus":
        start = tmp_path / "start"
        prepare_corpus("text", start, [text] * 2, "char" if case == "from a tokenizer" else "byte")
        (start / "notes.md").write_text("mine")
        (start / "cache" / "downloads").mkdir(parents=True)
        (start / "cache" / "downloads" / "x").write_text("mine")
    done = subprocess.run(
        [sys.executable, "-c", KILLED_EVERYWHERE, str(tmp_path), case],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    num_kills, first_new = map(int, done.stdout.split()[-2:])
    assert num_kills > 20 and 5 < first_new < num_kills - 5


def replace_again_and_again(out: Path, text: Path, stop) -> None:
    """By corpora of which no two have the same length, so none comes back."""
    sys.stdout = open(os.devnull, "w")
    for number in itertools.count():
        text.write_bytes(b"abc"[number % 3 :][:1] * (1000 + number))
        prepare_corpus("text", out, [text, text], overwrite=True)
        if stop.is_set():
            return


def test_a_reader_never_sees_a_mixture(tmp_path):
    out, text = tmp_path / "out", tmp_path / "mine.txt"
    text.write_bytes(b"a" * 999)
    prepare_corpus("text", out, [text, text])
    fork = multiprocessing.get_context("fork")
    stop = fork.Event()
    writer = fork.Process(target=replace_again_and_again, args=(out, text, stop))
    writer.start()
    lengths = set()
    try:
        for _ in range(400):
            corpus = load_corpus(out)
            try:
                found = current_corpus(corpus).split("train")
                read = found.bin_path.read_bytes()
                current_corpus(corpus)
            except (ValueError, FileNotFoundError):  # replaced meanwhile, and noticed
                continue
            assert len(read) == found.num_tokens
            assert len(set(read)) == 1
            lengths.add(len(read))
    finally:
        stop.set()
        writer.join()
    assert writer.exitcode == 0 and len(lengths) > 2


def test_a_run_goes_on_with_the_corpus_it_has_opened_and_a_late_one_is_told(old, text):
    corpus = load_corpus(old)
    windows = EvaluationWindows(corpus.split("valid"), 16)
    before = [batch["tokens"] for batch in windows]
    (text.parent / "other.txt").write_bytes(TEXT.upper())
    prepare_corpus("text", old, [text.parent / "other.txt"] * 2, overwrite=True)
    assert all((a["tokens"] == b).all() for a, b in zip(windows, before, strict=True))
    with pytest.raises(ValueError, match="replaced by another corpus while this run was starting"):
        current_corpus(corpus)


def test_sample_orders_of_the_replaced_corpus_go_and_others_stay(old, text):
    own = f"train-s16-n8-seed1-{load_corpus(old).fingerprint[:16]}"
    other = f"train-s16-n8-seed1-{'0' * 16}"
    for name in (own, other):
        (old / "cache" / name).mkdir()
        (old / "cache" / name / "x").touch()
    prepare_corpus("text", old, [text, text], "char", overwrite=True)
    assert sorted(path.name for path in (old / "cache").iterdir()) == ["downloads", other]


def test_a_damaged_corpus_is_made_again_only_where_nothing_can_be_lost(old, text, capsys):
    corpus = load_corpus(old)
    (old / "valid.bin").unlink()
    (old / "train.idx").write_bytes(b"")
    assert prepare_corpus("text", old, [text, text]) == corpus
    assert "preparing again" in capsys.readouterr().out
    (old / "train.bin").write_text("mine")
    before = tree(old)
    with pytest.raises(ValueError, match="train.bin has 4 bytes.*--overwrite"):
        prepare_corpus("text", old, [text, text])
    assert tree(old) == before
    assert prepare_corpus("text", old, [text, text], overwrite=True) == corpus


@pytest.mark.parametrize(
    "change", [{"format_version": 2}, {"splits": {"train": {}, "valid": {"num_tokens": 3}}}]
)
def test_a_corpus_of_another_release_is_kept_until_asked(old, text, change):
    description = json.loads((old / "corpus.json").read_text())
    (old / "corpus.json").write_text(json.dumps(description | change))
    before = tree(old)
    with pytest.raises(ValueError, match="format_version 2|is damaged or was not written by"):
        prepare_corpus("text", old, [text, text])
    assert tree(old) == before
    prepare_corpus("text", old, [text, text], overwrite=True)


def test_a_corpus_that_is_there_needs_no_writing(old, text, monkeypatch):
    monkeypatch.setattr(prepare, "building_folder", None)
    assert prepare_corpus("text", old, [text, text]) == load_corpus(old)


def test_a_corpus_that_came_meanwhile_is_not_replaced(tmp_path, text, monkeypatch):
    out, late = tmp_path / "out", prepare.building_folder

    def building_folder(folder, progress):
        monkeypatch.setattr(prepare, "building_folder", late)
        prepare_corpus("text", out, [text], "char")
        return late(folder, progress)

    monkeypatch.setattr(prepare, "building_folder", building_folder)
    with pytest.raises(ValueError, match="another prepare was writing"):
        prepare_corpus("text", out, [text])
    assert load_corpus(out).tokenizer["kind"] == "char"


def test_a_file_that_came_during_the_build_is_not_replaced(tmp_path, text, monkeypatch):
    out, write = tmp_path / "out", prepare._write_corpus

    def slow(*arguments):
        write(*arguments)
        (out / "train.bin").write_text("mine")

    monkeypatch.setattr(prepare, "_write_corpus", slow)
    with pytest.raises(ValueError, match="train.bin is there already"):
        prepare_corpus("text", out, [text])
    assert [path.name for path in out.iterdir()] == ["train.bin"]


def test_a_file_system_without_hard_links_will_do(old, text, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(corpus_folder.os, "link", refuse)
    corpus = prepare_corpus("text", old, [text, text], "char", overwrite=True)
    assert np.array_equal(
        np.fromfile(corpus.split("train").bin_path, np.uint8),
        np.fromfile(corpus.split("valid").bin_path, np.uint8),
    )
