"""What kind of checkpoint a folder is, and where its layers lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vqmoe_megatron.checkpoint.metadata import StoredTensor
from vqmoe_megatron.upcycle.source import MEGATRON, NOT_THE_MODEL, Source, open_source

PROJECTION = "self_attention.linear_proj.weight"
EXPERTS = "mlp.experts.experts.linear_fc1.weight"


def source(**shapes: tuple[int, ...]) -> Source:
    tensors = {name: StoredTensor(name, shape, "float32", 4, 1) for name, shape in shapes.items()}
    return Source(Path("iter_0000007"), MEGATRON, None, tensors)


def test_layers_are_stacked_or_numbered() -> None:
    stacked = source(
        **{f"decoder.layers.{PROJECTION}": (3, 8, 8), f"decoder.layers.{EXPERTS}": (3, 4, 16, 8)}
    )
    assert (stacked.num_layers, stacked.num_experts(2), stacked.iteration) == (3, 4, 7)
    assert stacked.of_layer(PROJECTION, 2)[1]
    assert stacked.of_layer(PROJECTION, 3) == (None, False)  # it ends before
    numbered = source(
        **{f"decoder.layers.{number}.{PROJECTION}": (8, 8) for number in range(12)},
        **{f"decoder.layers.10.{EXPERTS}": (4, 16, 8)},
    )
    assert numbered.num_layers == 12
    assert [numbered.num_experts(layer) for layer in (1, 10)] == [None, 4]
    stored, is_stacked = numbered.of_layer(PROJECTION, 11)
    assert (stored.name, is_stacked) == (f"decoder.layers.11.{PROJECTION}", False)


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight",
        "chained_0.optimizer.state.fp32_param.output_layer.weight",
        "random_state.cpu",
        "rng_state/shard_0.0_1.1",
        "rerun_state_machine_state/shard_0_1",
    ],
)
def test_what_is_beside_the_model(name: str) -> None:
    assert NOT_THE_MODEL.match(name)
    assert not NOT_THE_MODEL.match("decoder.optimizer.weight")


def test_folders_without_a_usable_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; give a run directory of vqmoe"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no complete checkpoint; give a run directory"):
        open_source(tmp_path)
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "fsdp_dtensor"}))
    with pytest.raises(ValueError, match="stored as 'fsdp_dtensor'; upcycling reads torch_dist"):
        open_source(tmp_path)
