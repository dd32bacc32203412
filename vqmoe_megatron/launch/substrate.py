"""What starts ranks: how a process learns which of them it is.

Every start of a rank asks every substrate, so their files import nothing heavy; Megatron must not
be imported yet.
"""

from __future__ import annotations

from collections.abc import Mapping


class Substrate:
    """Reads a rank's place from the variables that its launcher sets; touches nothing else."""

    variables: tuple[str, str, str]  # names of those for rank, world size and local rank
    starter = ""  # the command that sets them, for messages

    def is_here(self, environ: Mapping[str, str]) -> bool:
        """Whether this process was started so; asked in the registry's order, the first wins."""
        return any(name in environ for name in self.variables)
