"""A table layer reads the rows of the nearest codes; needs no Megatron; refuses what does not fit.

Drawn by hand: C slices of K codes, the table's row r holds r everywhere, so that an output tells
which rows were read.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vqmoe_megatron.vq.table_layer import TableLayer, TableSettings, load_table_layer

ROOT = Path(__file__).resolve().parents[2]
ONE_SLICE = TableSettings("euclidean", "discrete", "none", 1, "none", 0.0, "none", 1, 5, "float32")
TWO_SLICES = replace(ONE_SLICE, quantizer="product", num_code_slices=2)
# Runs in a process where importing Megatron, or the parts built on it, fails.
WITHOUT_MEGATRON = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        floors = ("moe", "runtime", "training", "data", "tracking")
        for closed in ("megatron", "omegaconf", *(f"vqmoe_megatron.{name}" for name in floors)):
            if name == closed or name.startswith(closed + "."):
                raise ImportError(f"{name} is closed here")

sys.meta_path.insert(0, Refuse())
import torch
from vqmoe_megatron.vq.table_layer import load_table_layer

try:
    import megatron.core
except ImportError:
    print("megatron is closed")
layer = load_table_layer(sys.argv[1])
print(layer(torch.tensor([[[9.0, 1.0], [-9.0, 1.0]]])).tolist())
"""


def one_slice() -> dict[str, torch.Tensor]:
    """K = 3 codes on a line, H = 2."""
    return {
        "codes": torch.tensor([[[-10.0, 0.0], [0.0, 0.0], [10.0, 0.0]]]),
        "table": torch.arange(3.0).unsqueeze(1).expand(3, 2).contiguous(),
    }


def two_slices() -> dict[str, torch.Tensor]:
    """C = 2 slices of width 1 with K = 2 codes, H = 2: rows 0, 1 of slice 0, rows 2, 3 of 1."""
    return {
        "codes": torch.tensor([[[-1.0], [1.0]], [[-1.0], [1.0]]]),
        "table": torch.tensor([[0.0, 10.0], [1.0, 20.0], [2.0, 40.0], [3.0, 80.0]]),
    }


def dual(combine: str = "softmax") -> tuple[dict[str, torch.Tensor], TableSettings]:
    num_logits = 2 if combine == "softmax" else 1
    gate = {"gate.weight": torch.zeros(num_logits, 2), "gate.bias": torch.zeros(num_logits)}
    return one_slice() | gate, replace(ONE_SLICE, path="dual", combine=combine)


def build(tensors: dict[str, torch.Tensor], settings: TableSettings) -> TableLayer:
    return TableLayer(tensors, settings.as_metadata())


def test_every_token_gets_its_nearest_codes_row():
    x = torch.tensor([[[9.0, 1.0], [-9.0, 1.0]], [[4.0, 0.0], [6.0, 0.0]]])
    y = build(one_slice(), ONE_SLICE)(x)
    assert torch.equal(y, torch.tensor([[[2.0] * 2, [0.0] * 2], [[1.0] * 2, [2.0] * 2]]))


def test_rows_of_slices_are_summed_and_scaled():
    y = build(two_slices(), TWO_SLICES)(torch.tensor([[0.5, -0.5], [-3.0, 3.0]]))
    expected = torch.tensor([[1.0 + 2.0, 20.0 + 40.0], [0.0 + 3.0, 10.0 + 80.0]]) / 2**0.5
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_the_norm_follows_the_sum(kind):
    settings = replace(
        TWO_SLICES, normalization=kind, normalization_eps=1e-3, output_norm="after_sum"
    )
    x = torch.tensor([[0.5, -0.5], [-3.0, 3.0]])
    norm = getattr(torch.nn, kind)(2, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 3.0]))
    tensors = {f"output_norm.{name}": part.data for name, part in norm.named_parameters()}
    y = build(two_slices() | tensors, settings)(x)
    torch.testing.assert_close(y, norm(build(two_slices(), TWO_SLICES)(x)).detach())


def test_cosine_ignores_the_tokens_length():
    settings = replace(ONE_SLICE, quantizer="cosine")
    directions = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]]) * 2**0.5
    layer = build(one_slice() | {"codes": directions}, settings)
    x = torch.tensor([[0.01, 0.02], [100.0, 20.0]])
    assert layer(x)[:, 0].tolist() == layer(50 * x)[:, 0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("combine", "share"), [("softmax", (0.5, 0.5)), ("sigmoid", (1.0, 0.5))])
def test_the_gate_weighs_both_paths(combine, share):
    layer = build(*dual(combine))
    x, y_continuous = torch.tensor([[9.0, 0.0]]), torch.tensor([[100.0, 200.0]])
    expected = share[0] * y_continuous + share[1] * layer.discrete(x)
    torch.testing.assert_close(layer.combine(x, y_continuous), expected)


def test_tokens_are_projected_where_codes_are_narrower():
    tensors = one_slice() | {"codes": torch.tensor([[[-2.0], [0.0], [2.0]]])}
    tensors["projection"] = torch.tensor([[0.0, 1.0]])
    layer = build(tensors, replace(ONE_SLICE, quantizer="low_dim"))
    assert layer(torch.tensor([[9.0, -3.0], [-9.0, 1.5]]))[:, 0].tolist() == [0.0, 2.0]


def test_a_gradient_is_refused_not_lost():
    layer, x = build(one_slice(), ONE_SLICE), torch.zeros(1, 2, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient"):
        layer(x)
    with pytest.raises(ValueError, match="no gradient"):
        build(*dual()).combine(x.detach(), x)
    with torch.no_grad():
        assert layer(x).tolist() == [[1.0, 1.0]]


def test_only_the_combined_output_of_a_dual_layer_is_the_layers():
    tensors, settings = dual()
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="path=dual"):
        build(tensors, settings)(x)
    with pytest.raises(ValueError, match="no combine gate"):
        build(one_slice(), ONE_SLICE).combine(x, x)
    with pytest.raises(ValueError, match="differ in shape"):
        build(tensors, settings).combine(x, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="H = 2"):
        build(one_slice(), ONE_SLICE)(torch.zeros(1, 3))


def test_a_cast_keeps_the_digits_of_codes_and_table():
    layer = build(one_slice() | {"table": torch.full((3, 2), 1.001)}, ONE_SLICE).to(torch.bfloat16)
    assert {buffer.dtype for buffer in layer.buffers()} == {torch.float32}
    assert layer(torch.zeros(1, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_settings_travel_through_the_file(tmp_path):
    settings = replace(ONE_SLICE, normalization_eps=1e-5 / 3)
    save_file(one_slice(), tmp_path / "x.safetensors", settings.as_metadata())
    layer = load_table_layer(tmp_path / "x.safetensors")
    assert layer.settings == settings
    assert torch.equal(layer.codes, one_slice()["codes"])


def test_a_file_is_read_without_megatron(tmp_path):
    save_file(one_slice(), tmp_path / "x.safetensors", ONE_SLICE.as_metadata())
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEGATRON, str(tmp_path / "x.safetensors")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["megatron is closed", "[[[2.0, 2.0], [0.0, 0.0]]]"]


def test_the_memory_of_a_layer_is_added_and_never_forgotten():
    x = torch.tensor([[9.0, 1.0], [-9.0, 1.0]])
    memory = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    plain, layer = (
        build(one_slice(), replace(ONE_SLICE, code_memory=memory)) for memory in ("none", "added")
    )
    assert torch.equal(layer(x, memory), plain(x) + memory)
    tensors, settings = dual()
    both = build(tensors, replace(settings, code_memory="added"))
    alone = build(tensors, settings)
    assert torch.equal(both.combine(x, x, memory), alone.combine(x, x) + memory)
    for call in (lambda: layer(x), lambda: both.combine(x, x)):
        with pytest.raises(ValueError, match="adds rows of a code memory: pass memory="):
            call()
    with pytest.raises(ValueError, match="has no code memory"):
        plain(x, memory)
    with pytest.raises(ValueError, match=r"output \[2, 2\] and memory \[1, 2\] differ"):
        layer(x, memory[:1])


def test_a_file_of_the_format_before_has_no_memory(tmp_path):
    metadata = ONE_SLICE.as_metadata() | {"format_version": "1"}
    del metadata["code_memory"]
    save_file(one_slice(), tmp_path / "x.safetensors", metadata)
    assert load_table_layer(tmp_path / "x.safetensors").settings == ONE_SLICE


BROKEN = {
    "version": (one_slice(), {"format_version": "3"}, "table format 3, this release reads 2"),
    "memory illegal": (one_slice(), {"code_memory": "some"}, "code_memory='some'"),
    "foreign": (one_slice(), {"format_version": None}, "table format None"),
    "setting missing": (one_slice(), {"combine": None}, "lack combine"),
    "setting illegal": (one_slice(), {"quantizer": "grid"}, "quantizer='grid'"),
    "number of slices": (one_slice(), {"num_code_slices": "2"}, "with C = 2"),
    "no codes": ({"table": torch.zeros(3, 2)}, {}, "codes none"),
    "table of other rows": (one_slice() | {"table": torch.zeros(4, 2)}, {}, r"table \[4, 2\]"),
    "table of another width": (one_slice() | {"table": torch.zeros(3, 4)}, {}, r"with H = C \* D"),
    "projection missing": (one_slice(), {"quantizer": "low_dim"}, "projection"),
    "norm missing": (two_slices(), {"num_code_slices": "2", "output_norm": "after_sum"}, "norm"),
    "gate left over": (dual()[0], {}, "gate.weight"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_refused(name, tmp_path):
    tensors, changes, says = BROKEN[name]
    metadata = ONE_SLICE.as_metadata() | changes
    metadata = {key: value for key, value in metadata.items() if value is not None}
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(ValueError, match=says) as refused:
        load_table_layer(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(refused.value)


@pytest.mark.parametrize("damage", ["absent", "cut"])
def test_a_damaged_file_is_refused(damage, tmp_path):
    path = tmp_path / "x.safetensors"
    if damage == "cut":
        save_file(one_slice(), path, ONE_SLICE.as_metadata())
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
        load_table_layer(path)
