"""Every parameter starts the same at every layout, gathered by its global name and place."""

from __future__ import annotations

import re

import pytest
from small_run import PARITY, initial_parameters, layout_overrides

pytestmark = pytest.mark.distributed

TP, PP, EP = (f"{name}_model_parallel_size" for name in ("tensor", "pipeline", "expert"))


def gathered(results) -> dict:
    """Put all ranks' parts together: name -> global tensor, NaN where no rank holds anything."""
    import torch

    whole = {}
    for rank in results:
        for label, (data, offset, shape) in rank.items():
            name = label.split(" ")[0]
            target = whole.setdefault(name, torch.full(shape, float("nan"), dtype=torch.float64))
            num_prepended = len(offset) - data.dim()
            place = tuple(offset[:num_prepended]) + tuple(
                slice(start, start + size)
                for start, size in zip(offset[num_prepended:], data.shape, strict=True)
            )
            target[place] = data.double()
    return whole


@pytest.mark.parametrize(
    "num_ranks, layout",
    [(2, {EP: 2}), (2, {TP: 2}), (2, {PP: 2}), (4, {TP: 2, EP: 4})],
    ids=["ep2", "tp2", "pp2", "tp2-ep4"],
)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_all_layouts_start_alike(num_ranks, layout, gated, ranks):
    import torch

    overrides = [f"model.gated_linear_unit={str(gated).lower()}"]
    expected = gathered(ranks(1).run(initial_parameters, str(PARITY), overrides))
    overrides += layout_overrides(layout)
    found = gathered(
        ranks(num_ranks).run(initial_parameters, str(PARITY), overrides, layout=layout)
    )
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert not tensor.isnan().any(), name
        assert torch.equal(found[name], tensor), name
    # A draw per name: no two layers and no two experts alike, router biases included.
    bias = expected["decoder.layers.mlp.router.bias"]
    assert len({tuple(row.tolist()) for row in bias}) == len(bias)


def test_a_memory_s_gate_starts_at_one_half(ranks):
    gated = ["code_memory.num_rows=64", "code_memory.gate=token"]
    found = gathered(ranks(1).run(initial_parameters, str(PARITY), gated))
    gates = [tensor for name, tensor in found.items() if ".memory_gate." in name]
    assert gates
    assert not any(tensor.any() for tensor in gates)


def test_another_seed_is_another_start(ranks):
    first, second = (
        gathered(ranks(1).run(initial_parameters, str(PARITY), [f"train.seed={seed}"]))
        for seed in (1, 2)
    )
    for name in ("embedding.word_embeddings.weight", "decoder.layers.mlp.router.weight"):
        assert (first[name] != second[name]).float().mean() > 0.99
    std = first["embedding.word_embeddings.weight"].std()
    assert 0.018 < std < 0.022  # model.init_method_std


def test_layers_that_differ_start_as_layers_that_are_alike(ranks):
    """A memory in some layers puts each layer's number into the names, and changes no draw."""
    alike = gathered(ranks(1).run(initial_parameters, str(PARITY), []))
    overrides = [
        "code_memory.num_rows=64",
        "code_memory.codes=embedding",
        "code_memory.layers=[1]",
    ]
    numbered = gathered(ranks(1).run(initial_parameters, str(PARITY), overrides))
    found = 0
    for name, tensor in numbered.items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if ".code_memory." in name or name.startswith("code_stream."):
            continue
        if layer is None:
            assert name in alike, name
            assert alike[name].equal(tensor), name
            continue
        found += 1
        assert alike[name.replace(f".{layer[1]}.", ".", 1)][int(layer[1])].equal(tensor), name
    assert found > 20


def test_an_embedding_may_start_at_a_scale_of_its_own(ranks):
    usual, louder = (
        gathered(ranks(1).run(initial_parameters, str(PARITY), overrides))
        for overrides in ([], ["model.embedding_init_method_std=0.5"])
    )
    name = "embedding.word_embeddings.weight"
    assert 0.45 < louder[name].std() < 0.55
    assert all(usual[key].equal(louder[key]) for key in usual if key != name)
