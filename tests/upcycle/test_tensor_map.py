"""Every way in which a stored tensor becomes a model's: names, layers, experts, pieces.

Sources are written by torch's own checkpoint writer under megatron-core's names; L = 2 layers.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed import checkpoint

from vqmoe_megatron.checkpoint.metadata import StoredTensor
from vqmoe_megatron.upcycle.source import MEGATRON, Source
from vqmoe_megatron.upcycle.tensor_map import NewPart, copy_tensors

FC1, FC2 = "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"
EXPERTS_FC1, EXPERTS_FC2 = (f"mlp.experts.experts.linear_fc{n}.weight" for n in (1, 2))


@pytest.fixture
def written(tmp_path: Path):
    """``written(name=tensor, ...)`` -> the source that holds them."""

    def write(tensors: dict[str, torch.Tensor]) -> Source:
        writer = checkpoint.FileSystemWriter(tmp_path)
        checkpoint.save(dict(tensors), storage_writer=writer, no_dist=True)
        stored = {
            name: StoredTensor(name, tuple(tensor.shape), "float32", 4 * tensor.numel(), 1)
            for name, tensor in tensors.items()
        }
        return Source(tmp_path, MEGATRON, None, stored)

    return write


class Model:
    """What a model says of its tensors."""

    def __init__(self, *parts: ShardedTensor) -> None:
        self.parts = parts

    def sharded_state_dict(self) -> dict[str, ShardedTensor]:
        return {str(number): part for number, part in enumerate(self.parts)}


def part(key: str, shape: tuple[int, ...], *places: tuple[int, int, int], num_prepended: int = 0):
    """A tensor of zeros at ``places``: Megatron's (axis, index, size)."""
    return ShardedTensor.from_rank_offsets(
        key, torch.zeros(shape), *places, prepend_axis_num=num_prepended
    )


def test_layers_stacked_or_numbered_in_either(written) -> None:
    stacked = torch.randn(2, 3, 4)
    source = written({"decoder.layers.a": stacked, "decoder.layers.1.b": stacked[0]})
    first = part("decoder.layers.0.a", (3, 4))  # numbered here, stacked there
    second = part("decoder.layers.a", (3, 4), (0, 1, 2), num_prepended=1)
    own = part("decoder.layers.b", (3, 4), (0, 1, 2), num_prepended=1)  # the other way round
    assert copy_tensors(Model(first, second, own), source) == (2, set())
    assert first.data.equal(stacked[0]) and second.data.equal(stacked[1])
    assert own.data.equal(stacked[0])


def test_norms_under_either_name(written) -> None:
    norms = torch.randn(2, 4)
    source = written(
        {
            "decoder.layers.self_attention.linear_qkv.layer_norm_weight": norms,
            "decoder.layers.pre_mlp_layernorm.weight": norms + 1,
        }
    )
    attention = part("decoder.layers.1.input_layernorm.weight", (4,))
    mlp = part("decoder.layers.1.mlp.linear_fc1.layer_norm_weight", (4,))
    copy_tensors(Model(attention, mlp), source)
    assert attention.data.equal(norms[1]) and mlp.data.equal(norms[1] + 1)


def test_a_dense_mlp_is_every_expert_and_its_outputs_are_scaled(written) -> None:
    fc1, fc2 = torch.randn(2, 6, 4), torch.randn(2, 4, 6)
    source = written({f"decoder.layers.{FC1}": fc1, f"decoder.layers.{FC2}": fc2})
    first = part(f"decoder.layers.{EXPERTS_FC1}", (3, 6, 4), (0, 1, 2), num_prepended=1)
    second = part(f"decoder.layers.{EXPERTS_FC2}", (3, 4, 6), (0, 0, 2), num_prepended=1)
    router = part("decoder.layers.mlp.router.weight", (3, 4), (0, 1, 2), num_prepended=1)
    _, new = copy_tensors(Model(first, second, router), source, output_scale=3.0)
    assert first.data.equal(fc1[1].expand(3, 6, 4))
    assert second.data.equal(3.0 * fc2[0].expand(3, 4, 6))
    assert new == {NewPart("mlp.router.weight", 1)}


def test_one_expert_is_a_dense_mlp_and_several(written) -> None:
    one = torch.randn(2, 1, 6, 4)
    source = written({f"decoder.layers.{EXPERTS_FC1}": one})
    dense = part(f"decoder.layers.1.{FC1}", (6, 4))
    several = part(f"decoder.layers.0.{EXPERTS_FC1}", (3, 6, 4))
    copy_tensors(Model(dense, several), source)
    assert dense.data.equal(one[1, 0])
    assert several.data.equal(one[0].expand(3, 6, 4))


def test_experts_go_by_global_id_and_halves_by_place(written) -> None:
    experts, dense = torch.randn(2, 3, 6, 4), torch.randn(6, 4)
    source = written({f"decoder.layers.{EXPERTS_FC2}": experts, f"decoder.layers.0.{FC1}": dense})
    of_one = part(  # as SequentialMLP has each expert
        f"decoder.layers.{EXPERTS_FC2}", (6, 4), (0, 1, 2), (1, 2, 3), num_prepended=2
    )
    half = part(f"decoder.layers.0.{FC1}", (3, 4), (0, 1, 2))  # as a gated MLP is cut
    copy_tensors(Model(of_one, half), source, output_scale=8.0)
    assert of_one.data.equal(experts[1, 2])  # an expert that was one is not scaled
    assert half.data.equal(dense[3:])


def test_what_does_not_fit_is_named_before_anything_is_copied(written) -> None:
    source = written(
        {
            "embedding.word_embeddings.weight": torch.randn(384, 4),
            f"decoder.layers.0.{EXPERTS_FC1}": torch.randn(2, 6, 4),
            "decoder.layers.0.self_attention.q_layernorm.weight": torch.randn(4),
            "decoder.final_layernorm.weight": torch.randn(4),
        }
    )
    norm = part("decoder.final_layernorm.weight", (4,))
    parts = [
        norm,
        part("embedding.word_embeddings.weight", (256, 4)),
        part("output_layer.weight", (256, 4)),
        part(f"decoder.layers.0.{EXPERTS_FC1}", (3, 6, 4)),
        part("decoder.layers.0.mlp.router.weight", (3, 4)),
    ]
    with pytest.raises(ValueError) as refused:
        copy_tensors(Model(*parts), source)
    for said in (
        "embedding.word_embeddings.weight: source [384, 4], this recipe [256, 4]; another "
        "vocabulary, or one that Megatron padded otherwise",
        "model.make_vocab_size_divisible_by=384",
        "output_layer.weight: not in the source; it is the embedding there: model.untie_embeddings",
        f"decoder.layers.0.{EXPERTS_FC1}: source [2, 6, 4], this recipe [3, 6, 4]",
        "decoder.layers.0.mlp.router.weight: not in the source",  # which has experts there
        "q_layernorm.weight: source [4], for which this recipe's model has no place",
    ):
        assert said in str(refused.value)
    assert not norm.data.any()


def test_parts_of_a_vqmoe_are_new(written) -> None:
    source = written({"decoder.layers.0.a": torch.randn(4)})
    names = ("mlp.code_memory.weight", "mlp.assigner.codebook.codes", "mlp.output_norm.weight")
    parts = [part(f"decoder.layers.0.{name}", (4,)) for name in names]
    parts += [part("code_stream.code_of_token", (4,)), part("decoder.layers.0.a", (4,))]
    _, new = copy_tensors(Model(*parts), source)
    assert new == {
        *(NewPart(name, 0) for name in names),
        NewPart("code_stream.code_of_token", None),
    }
