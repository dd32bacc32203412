"""Recipe files that are no recipe, cannot be read twice, or stand for more than they look like."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.config.recipe_text import MOST_BYTES

LAUGHS = "a: &l0 [x, x]\n" + "".join(
    f"b{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 6)
)
CHAIN = "a: &l0 [x]\n" + "".join(f"b{n}: &l{n} [*l{n - 1}]\n" for n in range(1, 600))


def failure(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_recipe(path, list(overrides))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: write sections (model, vq"),
        ("# a comment\n\n", "is empty: write"),
        ("---\n...\n", "is empty: write"),
        ("null", "is empty: write"),
        ("~", "start from recipes/quickstart.yaml"),
        ("[]", "not a list"),
        ("vq", "not a single value"),
        ("a: 1\n---\nb: 2\n", "not valid YAML: line 2"),
        ("vq: {num_codes: 1}\nvq: {num_codes: 2}\n", "line 2, column 1: found duplicate key vq"),
        ("vq:\n  num_codes: 1\n  num_codes: 2\n", "found duplicate key num_codes"),
        ("? [a]\n: 1\n", "not valid YAML: line 1"),
        ("vq: *nothing", "not valid YAML: line 1"),
        ("vq: &x [*x]", "nested deeper than 10 levels"),
        ("vq: " + "[" * 5000, "nested deeper than 10 levels"),
        ("vq: " + "{a: " * 20 + "1" + "}" * 20, "nested deeper than 10 levels"),
        (CHAIN, "nested deeper than 10 levels"),
        (LAUGHS, "more than 10,000 values, its aliases written out"),
        ("#" * MOST_BYTES + "\n{}", f"longer than {MOST_BYTES} bytes"),
        ("vq: a\x07", "not valid YAML"),
        ("train: {seed: !!int ''}", "line 1, column 15: the tag tag:yaml.org,2002:int; write"),
        ("vq: {num_codes: !!float x}", "write the value without one"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line_and_at_once(
    tmp_path, text: str, message: str
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    started = time.process_time()
    assert message in failure(path) and str(path) in failure(path)
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[" * 5000, "nested deeper than 10 levels"),
        ("&x [*x]", "nested deeper than 10 levels"),
        ("[&a [1,1,1,1,1,1,1,1,1,1]" + ", *a" * 1500 + "]", "more than 10,000 values"),
        ("!!int x", "write the value without one"),
        ("9" * 5000, "a whole number of 5,000 digits"),
        ("\udcff", "special characters are not allowed"),
    ],
)
def test_an_override_is_held_to_the_same_limits(tmp_path, value: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("{}")
    text = failure(path, f"model.recompute_modules={value}")
    assert message in text and "override 'model.recompute_modules=" in text


def test_aliases_that_stay_small_are_read(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {num_layers: &n 6, num_moe_experts: *n}\n")
    assert load_recipe(path, []).model.num_moe_experts == 6


def test_a_pipe_is_read_once(tmp_path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_text("vq:\n  num_codes: 48\n"))
    writer.start()
    config = load_recipe(path, ["train.seed=7"])
    writer.join()
    assert (config.vq.num_codes, config.train.seed) == (48, 7)
    read_end, write_end = os.pipe()
    os.write(write_end, b"vq:\n  num_code: 1\n")
    os.close(write_end)
    name = f"/dev/fd/{read_end}"
    assert failure(Path(name)).endswith(f"({name}:2)")
    os.close(read_end)


def test_a_device_without_an_end_is_refused() -> None:
    assert "longer than" in failure(Path("/dev/zero"))
    assert "is empty" in failure(Path("/dev/null"))


@pytest.mark.parametrize("name", ["x" * 300, "r.yaml/x"])
def test_a_path_that_cannot_be_opened(tmp_path, name: str) -> None:
    (tmp_path / "r.yaml").write_text("{}")
    text = failure(tmp_path / name)
    assert "does not exist" in text or "cannot be read: File name too long" in text
