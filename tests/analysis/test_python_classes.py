"""Bytes of Python source get the class of the token they are in."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from vqmoe_megatron.analysis.python_classes import CLASSES, UNKNOWN, byte_classes

SOURCE = 'def f(é):\r\n    return "a\nb" if é else 1.5  # ä\n'.replace('"a\nb"', '"""a\nb"""')


def texts(source: str) -> dict[str, str]:
    content, found = source.encode(), byte_classes(source.encode())
    return {
        name: bytes(b for b, c in zip(content, found, strict=True) if CLASSES[c] == name).decode()
        for name in CLASSES
    }


def test_every_byte_has_the_class_of_its_token() -> None:
    found = texts(SOURCE)
    assert found["keyword"] == "defreturnifelse"
    assert found["name"] == "féé"
    assert found["string"] == '"""a\nb"""'
    assert found["number"] == "1.5"
    assert found["operator"] == "():"
    assert found["comment"] == "# ä"
    assert not found["space"].strip()


def test_what_is_no_python_is_unknown() -> None:
    for source in (b"def (:\n  ' ", b"\xff\xfe", b"if x:\n    a\n  b\n"):
        assert set(byte_classes(source)) == {UNKNOWN}
    assert byte_classes(b"").shape == (0,)


def test_a_file_of_the_library_is_mostly_known() -> None:
    content = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_bytes()
    found = byte_classes(content)
    assert set(found.tolist()) == set(range(len(CLASSES)))
