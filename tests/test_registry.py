"""Names to parts: found lazily, also in an installed package; refused with the legal names."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from toy_package import pretend_installed

from vqmoe_megatron import registry
from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.metrics.table import OUR_METRICS


def install(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    """As if a package with these entry points (KIND__NAME=target) were installed."""
    pretend_installed(monkeypatch, {n.replace("__", "."): t for n, t in points.items()})


@pytest.fixture(autouse=True)
def forget_installed():  # noqa: ANN201
    yield
    registry._installed.cache_clear()


@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k, kind in registry.KINDS.items() for n in kind.built_in]
)
def test_every_part_of_ours_loads_and_implements_its_interface(kind: str, name: str) -> None:
    module, _, attribute = registry.KINDS[kind].interface.partition(":")
    interface = getattr(__import__(module, fromlist=[attribute]), attribute)
    assert issubclass(registry.load(kind, name), interface)


def test_names_and_rules_import_nothing() -> None:
    script = (
        "import sys; from vqmoe_megatron import registry\n"
        "for kind in registry.KINDS:\n"
        "    for name in registry.names(kind): registry.takes(kind, name)\n"
        "print([m for m in ('torch', 'megatron', 'mlflow', 'numpy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr


@pytest.mark.parametrize("kind", registry.KINDS)
def test_an_unknown_name_is_answered_with_all(kind: str) -> None:
    with pytest.raises(ValueError, match="is not legal; choose one of") as caught:
        registry.load(kind, "nonsense")
    assert all(name in str(caught.value) for name in registry.names(kind))
    assert registry.KINDS[kind].key in str(caught.value)


def test_an_installed_part_is_named_and_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, quantizer__mine="vqmoe_megatron.vq.quantizers.cosine:Cosine")
    assert "mine" in registry.names("quantizer")
    assert registry.load("quantizer", "mine").__name__ == "Cosine"
    assert VQConfig(quantizer="mine").quantizer == "mine"
    with pytest.raises(ValueError, match="choose one of euclidean, .*, mine"):
        VQConfig(quantizer="yours")


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"quantizer__cosine": "a:b"}, "there is a quantizer cosine already"),
        ({"flavour__mine": "a:b"}, "write KIND.NAME with a kind of quantizer"),
        ({"quantizer": "a:b"}, "write KIND.NAME"),
    ],
)
def test_wrong_entry_points_are_refused(monkeypatch, point: dict, message: str) -> None:  # noqa: ANN001
    install(monkeypatch, **point)
    with pytest.raises(ValueError, match=message):
        registry.names("quantizer")


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("no.such.package:Mine", "ModuleNotFoundError"),
        ("vqmoe_megatron.vq.losses:Nothing", "AttributeError"),
        ("vqmoe_megatron.vq.losses", "AttributeError"),
        ("module_that_divides_by_zero:Mine", "ZeroDivisionError"),
    ],
)
def test_a_part_that_cannot_be_loaded_says_where_it_comes_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str, error: str
) -> None:
    (tmp_path / "module_that_divides_by_zero.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    install(monkeypatch, quantizer__mine=target)
    with pytest.raises(ValueError, match=f"quantizer.mine = {target} of .* cannot .*: {error}"):
        registry.load("quantizer", "mine")


@pytest.mark.parametrize("kind", registry.KINDS)
@pytest.mark.parametrize(
    ("target", "found"), [("json:JSONDecoder", "JSONDecoder|type"), ("json:loads", "function")]
)
def test_a_part_must_implement_its_kinds_interface(
    monkeypatch: pytest.MonkeyPatch, kind: str, target: str, found: str
) -> None:
    install(monkeypatch, **{f"{kind}__mine": target})
    wanted = registry.KINDS[kind].interface.replace(":", ".")
    with pytest.raises(ValueError, match=f"^entry point {kind}.mine = {target} .*") as caught:
        registry.load(kind, "mine")
    assert re.search(
        rf"is (a|the class) ({found}); it must be an? .* of {wanted}$", str(caught.value)
    )


def test_a_part_with_only_half_of_its_interface_names_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, task__mine="vqmoe_megatron.tasks.task:Task")
    with pytest.raises(ValueError, match="does not define evaluation_batches, forward_step, "):
        registry.load("task", "mine")


def test_a_part_inside_a_class_is_found_as_entry_points_write_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, metric__mine="test_registry_parts:Parts.ROW")
    module = types.ModuleType("test_registry_parts")
    module.Parts = types.SimpleNamespace(ROW=OUR_METRICS[0])
    monkeypatch.setitem(sys.modules, "test_registry_parts", module)
    assert registry.load("metric", "mine") is OUR_METRICS[0]
