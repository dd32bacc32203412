"""Where a checkpoint keeps its layers, from the names of its tensors."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.distributed


def places_of(names: list[str], num_layers: int) -> dict:
    """In a rank: the file imports Megatron."""
    from vqmoe_megatron.checkpoint.stored_layers import layer_places

    places = layer_places(names, num_layers)
    return {number: [place.prefix, place.offsets] for number, place in places.items()}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["decoder.layers.mlp.assigner.codebook.codes", "decoder.layers.mlp.router.weight"],
            {number: ["decoder.layers.mlp.", ((0, number - 1, 3),)] for number in (1, 2, 3)},
        ),
        (
            [f"decoder.layers.{i}.mlp.assigner.codebook.codes" for i in (10, 0, 2)],
            {i + 1: [f"decoder.layers.{i}.mlp.", ()] for i in (0, 2, 10)},
        ),
        (["optimizer.decoder.layers.mlp.assigner.codebook.codes", "decoder.layers.mlp.x"], {}),
    ],
    ids=["stacked", "numbered", "none"],
)
def test_layers_are_found_by_their_codes(names, expected, ranks):
    (found,) = ranks(1).run(places_of, names, 3)
    assert list(found) == list(expected)
    assert {number: [place[0], tuple(place[1])] for number, place in found.items()} == expected
