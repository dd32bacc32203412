"""The learned scale of cosine codes: what it changes, what it does not, where it goes."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.vq.codebook import Codebook, build_codebook

HIDDEN = 8


def make(**settings: object) -> Codebook:
    vq = VQConfig(num_codes=6, init="uniform", quantizer="cosine", **settings)
    return build_codebook(vq, HIDDEN, seed=3)


def test_without_it_there_is_no_such_tensor() -> None:
    assert set(dict(make().named_parameters())) == {"codes"}
    assert "scale" not in make().state_dict()


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_it_goes_to_the_mean_cosine_and_changes_no_assignment(update: str) -> None:
    codebook = make(learn_code_scale=True, codebook_update=update).double()
    x = codebook.prepare(torch.randn(300, HIDDEN, dtype=torch.float64))
    ids = codebook.search(x)
    assert codebook.scale.dtype == torch.float64 and codebook.codes.requires_grad == (
        update == "gradient"
    )
    optimizer = torch.optim.SGD([codebook.scale], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        codebook.losses(x.detach(), codebook.code_vectors(), ids)[1].backward()
        optimizer.step()
    mean_cosine = torch.nn.functional.cosine_similarity(x, codebook.lookup(ids)).mean()
    assert float(codebook.scale) == pytest.approx(float(mean_cosine), rel=1e-6)
    assert torch.equal(codebook.search(x), ids)
    lengths = codebook.code_vectors().norm(dim=2)
    torch.testing.assert_close(lengths, (codebook.scale * HIDDEN**0.5).expand_as(lengths))


def test_a_frozen_codebook_holds_it_still() -> None:
    codebook = make(learn_code_scale=True, freeze_codebook=True)
    assert "scale" in codebook.state_dict() and not codebook.scale.requires_grad


def test_it_stays_fp32_in_half_precision_models() -> None:
    assert make(learn_code_scale=True).bfloat16().scale.dtype == torch.float32
