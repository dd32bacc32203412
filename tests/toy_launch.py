"""The toy package's launch substrate; it is asked before anything heavy may be imported."""

from __future__ import annotations

from vqmoe_megatron.launch.substrate import Substrate


class Toyrun(Substrate):
    """A launch substrate: ``toyrun`` sets three variables of its own."""

    variables = ("TOY_RANK", "TOY_SIZE", "TOY_LOCAL_RANK")
    starter = "toyrun"
