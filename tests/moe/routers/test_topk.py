"""Balance losses weigh the same however a batch is cut and wherever its parts are."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import PARITY, TINY, layout_overrides, train_here  # noqa: E402

pytestmark = pytest.mark.distributed

TP2 = {"tensor_model_parallel_size": 2}
# So strong that it is most of the gradient, and codes that do not depend on the first microbatch.
STRONG = ["model.moe_aux_loss_coeff=10", "vq.init=uniform", "vq.dead_code_threshold=0"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    import sysconfig

    from vqmoe_megatron.data.prepare import prepare_corpus

    out = tmp_path_factory.mktemp("corpus") / "corpus"
    files = [Path(sysconfig.get_path("stdlib")) / "typing.py"]
    prepare_corpus("text", out, files, "byte", None, False, False)
    return out


def grad_norm(ranks, num_ranks, layout, corpus, run_dir, kind, *overrides) -> float:
    every = [*TINY, *STRONG, f"model.moe_router_load_balancing_type={kind}", *overrides]
    every += ["train.train_iters=8", "train.exit_interval=1", f"data.path={corpus}"]
    every += [f"train.output_dir={run_dir}", *layout_overrides(layout)]
    results = ranks(num_ranks).run(train_here, str(PARITY), every, layout=layout)
    return results[0]["records"][0]["grad_norm"]


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_per_token_and_per_microbatch_agree_when_all_tokens_count(kind, ranks, corpus, tmp_path):
    whole = ["train.micro_batch_size=4"]  # one microbatch: nothing is averaged
    per_token = [*whole, "model.calculate_per_token_loss=true"]
    norms = {
        name: grad_norm(ranks, num_ranks, layout, corpus, tmp_path / name, kind, *overrides)
        for name, (num_ranks, layout, overrides) in {
            "one": (1, {}, whole),
            "one_per_token": (1, {}, per_token),
            "tp2": (2, TP2, whole),
            "tp2_per_token": (2, TP2, per_token),
        }.items()
    }
    assert norms == {name: pytest.approx(norms["one"], rel=1e-5) for name in norms}


def test_the_global_loss_does_not_shrink_with_data_parallel_ranks(ranks, corpus, tmp_path):
    norms = [
        grad_norm(
            ranks,
            num_ranks,
            {},
            corpus,
            tmp_path / f"{num_ranks}_{per_token}",
            "global_aux_loss",
            f"train.micro_batch_size={4 // num_ranks}",
            f"model.calculate_per_token_loss={per_token}",
        )
        for num_ranks in (1, 2)
        for per_token in ("false", "true")
    ]
    assert norms == [pytest.approx(norms[0], rel=1e-5)] * 4
