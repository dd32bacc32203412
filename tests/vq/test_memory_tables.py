"""An exported code memory reads the rows that a token's codes say; needs no Megatron.

Drawn by hand: row r of the memory holds 2^r, so that a sum tells which rows were read.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vqmoe_megatron.vq.memory_tables import (
    MemoryCodes,
    MemoryLayer,
    MemorySettings,
    load_code_memory,
)
from vqmoe_megatron.vq.row_addresses import row_ids

ROOT = Path(__file__).resolve().parents[2]
ONE_ORDER = MemorySettings("embedding", 4, 1, 0, 0.5, "none", 0, 5)
TOKENS = torch.tensor([[0, 2, 1, 2]])
STARTS = torch.tensor([[True, False, True, False]])
CODE_OF_TOKEN = torch.tensor([3, 0, 1])
WITHOUT_MEGATRON = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        floors = ("moe", "runtime", "engines", "data", "checkpoint")
        for closed in ("megatron", "omegaconf", *(f"vqmoe_megatron.{name}" for name in floors)):
            if name == closed or name.startswith(closed + "."):
                raise ImportError(f"{name} is closed here")

sys.meta_path.insert(0, Refuse())
import torch
from vqmoe_megatron.vq.memory_tables import load_code_memory

try:
    import megatron.core
except ImportError:
    print("megatron is closed")
memory = load_code_memory(sys.argv[1])
tokens = torch.tensor([[0, 2, 1, 2]])
print(memory.adds(3, torch.zeros(1, 4, 2), tokens, tokens == 0)[0, :, 0].tolist())
print(memory.adds(1, torch.zeros(1, 4, 2), tokens, tokens == 0))
"""


def rows_of(num_rows: int) -> torch.Tensor:
    return (2.0 ** torch.arange(num_rows)).unsqueeze(1).repeat(1, 2)


def codes(settings: MemorySettings = ONE_ORDER, **tensors: torch.Tensor) -> MemoryCodes:
    return MemoryCodes({"code_of_token": CODE_OF_TOKEN} | tensors, settings.as_metadata())


def layer(settings: MemorySettings = ONE_ORDER, **more: torch.Tensor) -> MemoryLayer:
    tensors = {"rows": rows_of(settings.num_addresses * settings.num_rows)}
    tensors |= {name.replace("gate_", "gate."): tensor for name, tensor in more.items()}
    return MemoryLayer(tensors, replace(settings, layer_number=3).as_metadata())


def test_a_token_reads_the_row_of_its_code() -> None:
    rows = codes().row_ids(TOKENS, STARTS)
    assert rows.tolist() == [[[3], [1], [0], [1]]]
    y = layer()(torch.zeros(1, 4, 2), rows)
    assert y[0, :, 0].tolist() == [8.0, 2.0, 1.0, 2.0]


def test_orders_see_the_codes_before_in_the_document_only() -> None:
    settings = replace(ONE_ORDER, max_order=2, num_rows=64)
    rows = codes(settings).row_ids(TOKENS, STARTS)
    assert torch.equal(rows, row_ids(CODE_OF_TOKEN[TOKENS], STARTS, 64, 2))
    assert rows[0, 1, 1] != rows[0, 3, 1]  # the same token behind another one
    joined = codes(settings).row_ids(TOKENS, torch.zeros_like(STARTS))
    assert joined[0, 2, 1] != rows[0, 2, 1]
    assert torch.equal(joined[0, :2], rows[0, :2])


def test_contexts_are_two_more_addresses() -> None:
    settings = replace(ONE_ORDER, num_context_codes=2)
    table = torch.tensor([[-1.0], [0.0], [1.0]])
    found = codes(settings, context_table=table, context_codes=torch.tensor([[-1.0], [1.0]]))
    rows = found.row_ids(TOKENS, STARTS)
    assert rows.shape == (1, 4, 3)
    # Means with decay 0.5: -0.5; 0.5 - 0.25; 0; 0.5. Of the third both codes are as near.
    assert (rows[0, :, 1] // 3).tolist() == [0, 1, 0, 1]
    assert layer(settings)(torch.zeros(1, 4, 2), rows).shape == (1, 4, 2)


def test_a_gate_weighs_what_was_read() -> None:
    settings, weight = replace(ONE_ORDER, gate="token"), torch.tensor([[1.0, 0.0]])
    gated = layer(settings, gate_weight=weight, gate_bias=torch.tensor([0.5]))
    x = torch.tensor([[[0.0, 9.0], [1.0, 9.0], [2.0, 9.0], [3.0, 9.0]]])
    rows = codes().row_ids(TOKENS, STARTS)
    expected = layer()(x, rows) * (x[..., :1] + 0.5).sigmoid()
    torch.testing.assert_close(gated(x, rows), expected)


def test_codes_of_hidden_states_are_the_layers_own() -> None:
    settings = replace(ONE_ORDER, codes="hidden")
    of_layer = layer(settings, codes=torch.tensor([[[0.0, 0.0], [5.0, 0.0]]]))
    x = torch.tensor([[[1.0, 0.0], [4.0, 0.0], [4.0, 9.0], [0.0, 0.0]]])
    assert of_layer.row_ids(x, STARTS).flatten().tolist() == [0, 1, 1, 0]
    with pytest.raises(ValueError, match="ask MemoryLayer.row_ids"):
        MemoryCodes({}, settings.as_metadata()).row_ids(TOKENS, STARTS)
    with pytest.raises(ValueError, match="ask MemoryCodes.row_ids"):
        layer().row_ids(x, STARTS)


def test_results_have_the_dtype_of_tokens_and_tables_keep_theirs() -> None:
    half = layer().bfloat16()
    assert half.rows.dtype == torch.float32
    rows = codes().row_ids(TOKENS, STARTS)
    assert half(torch.zeros(1, 4, 2, dtype=torch.bfloat16), rows).dtype == torch.bfloat16


def write(folder: Path, **changes: str | None) -> None:
    metadata = {k: v for k, v in (ONE_ORDER.as_metadata() | changes).items() if v is not None}
    save_file({"code_of_token": CODE_OF_TOKEN}, folder / "code_memory.safetensors", metadata)
    of_layer = replace(ONE_ORDER, layer_number=3).as_metadata()
    save_file({"rows": rows_of(4)}, folder / "memory_0003.safetensors", of_layer)


def test_a_folder_is_read_without_megatron(tmp_path: Path) -> None:
    write(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEGATRON, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["megatron is closed", "[8.0, 2.0, 1.0, 2.0]", "None"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format_version": "2"}, "code memory format 2, this release reads 1"),
        ({"format_version": None}, "code memory format None"),
        ({"max_order": None}, "lack max_order"),
        ({"num_context_codes": "2"}, "the settings need .*context_codes"),
        ({"codes": "hidden"}, "the settings need {}"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, says: str, tmp_path: Path) -> None:
    write(tmp_path, **changes)
    with pytest.raises(ValueError, match=says) as refused:
        load_code_memory(tmp_path)
    assert "code_memory.safetensors is no code memory" in str(refused.value)


def test_wrong_shapes_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
        load_code_memory(tmp_path)
    with pytest.raises(ValueError, match=r"rows \[4, 2\]: the settings need 8 rows"):
        MemoryLayer({"rows": rows_of(4)}, replace(ONE_ORDER, max_order=2).as_metadata())
    with pytest.raises(ValueError, match=r"tokens \[1, 4\] and starts \[1, 3\]"):
        codes().row_ids(TOKENS, STARTS[:, :3])
    with pytest.raises(ValueError, match=r"need \[b, S, 2\] and \[b, S, 1\]"):
        layer()(torch.zeros(1, 4, 3), torch.zeros(1, 4, 1, dtype=torch.int64))
