"""The end of a process in words, signals by name."""

import pytest

from vqmoe_megatron.runtime.exit_codes import end_in_words


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "ended with exit code 0"),
        (137, "ended with exit code 137"),
        (-9, "was killed by SIGKILL, most likely out of memory"),
        (-15, "was killed by SIGTERM"),
        (-40, "was killed by signal 40"),
    ],
)
def test_an_end_has_words(code, words):
    assert end_in_words(code) == words
