"""The pages of commands and metrics have all of them."""

from __future__ import annotations

import re

import command_pages as pages
import typer

from vqmoe_megatron import cli
from vqmoe_megatron.metrics.table import OUR_METRICS

COMMANDS = dict(pages.walk(typer.main.get_command(cli.app), ("vqmoe",)))


def test_nested_commands_are_found() -> None:
    assert {"vqmoe pretrain", "vqmoe study report", "vqmoe checkpoint inspect"} <= set(COMMANDS)


def test_every_command_is_there_with_its_options_and_an_example() -> None:
    page = pages.command_page()
    for name, command in COMMANDS.items():
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert re.search(rf"```bash\n(srun -N 4 )?{name}\b", section), name
        options = [p.opts for p in command.params if p.param_type_name == "option"]
        shown = [f"`{option}`" in section for option in sum(options, []) if option != "--help"]
        assert all(shown), name


def test_every_metric_is_there_with_its_unit() -> None:
    page = pages.metric_page()
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert list(rows) == [row.name for row in OUR_METRICS]
    assert "| nats/token |" in rows["loss"]
    assert "mean over layers" in rows["vq/code_perplexity"]
    assert "summed over the steps" in rows["vq/revived_codes"]
