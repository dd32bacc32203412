"""A code memory's figures as the plan shows them: those of the formulas, and in every output."""

from __future__ import annotations

import io
import json

from real_model import recipe
from rich.console import Console

from vqmoe_megatron.cli.plan_tables import show_plan
from vqmoe_megatron.plan.layout import check_layout
from vqmoe_megatron.plan.memory_report import code_memory_json
from vqmoe_megatron.plan.run_plan import plan_json, plan_run

EP2 = "parallel.expert_model_parallel_size=2"
MEMORY = [
    "code_memory.num_rows=1024",
    "code_memory.codes=embedding",
    "code_memory.num_codes=40",
]


def test_figures_of_a_rank() -> None:
    config = recipe([*MEMORY, EP2])
    found = code_memory_json(config, check_layout(config, 2, "cpu"))
    assert (found["rows_per_layer"], found["rows_per_rank"]) == (3072, 1536)
    assert found["row_bytes_per_rank"] == 1536 * 48 * 4
    assert found["plan_bytes_by_axis"] == {"expt_tp_ep": 8 + 24 * 8}
    assert found["layer_bytes_by_axis"] == {"expt_tp_ep": 2 * 24 * 48 * 4}
    assert found["codes_bytes_by_axis"] == {}
    assert not found["is_table"]


def test_tables_and_json_show_it_where_it_is() -> None:
    plan = plan_run(recipe([*MEMORY, EP2]), 2, "CPU")
    shown = Console(file=io.StringIO(), width=160)
    show_plan(plan, [], shown)
    said = shown.file.getvalue()
    assert "1,536 of 3,072" in said
    assert "rows: those read travel (3,072 rows, at most 48" in said
    assert "expt_tp_ep 9.00 KiB" in said
    assert json.loads(json.dumps(plan_json(plan)))["code_memory"]["rows_per_rank"] == 1536
    assert "code_memory" not in plan_json(plan_run(recipe([EP2]), 2, "CPU"))
