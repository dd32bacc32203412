"""A megatron-core that does things otherwise is refused in one sentence, whatever its version."""

from __future__ import annotations

import pytest

from vqmoe_megatron.engines.megatron import abilities as megatron_abilities

TRACKER: dict = {}


def of_0_16(self, sharded_state_dict, checkpoint_dir):  # noqa: ANN001, ANN201
    """The signature of TorchDistSaveShardedStrategy.async_save there."""


def of_0_17(self, sharded_state_dict, checkpoint_dir, async_strategy="nvrx"):  # noqa: ANN001, ANN201
    """The same in 0.17 and newer."""


@pytest.mark.parametrize(
    ("get_tracker", "async_save", "words"),
    [
        (lambda: TRACKER, of_0_16, []),
        (lambda: TRACKER, of_0_17, ["async_strategy"]),
        (lambda: {}, of_0_17, ["is a copy", "async_strategy"]),
    ],
)
def test_what_the_library_does_decides(get_tracker, async_save, words) -> None:
    missing = list(megatron_abilities.missing_abilities(get_tracker, async_save))
    assert len(missing) == len(words)
    for sentence, word in zip(missing, words, strict=True):
        assert word in sentence


def test_the_installed_one_is_taken() -> None:
    megatron_abilities.require_abilities()


def test_the_message_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(megatron_abilities, "get_moe_layer_wise_logging_tracker", lambda: {})
    with pytest.raises(ValueError, match=r"is a copy.*pip install 'megatron-core==0.16.1'"):
        megatron_abilities.require_abilities()
