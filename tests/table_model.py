"""A checkpoint's model in evaluation, and the same model with tables in its layers' places."""

from __future__ import annotations

from pathlib import Path

SEQUENCES = 4


def export_here(checkpoint: str, out: str) -> dict:
    """Export in this rank, whose process groups stand."""
    from dataclasses import replace

    from vqmoe_megatron.checkpoint.inspection import inspect_checkpoint
    from vqmoe_megatron.checkpoint.table_export import write_tables
    from vqmoe_megatron.config import ParallelConfig
    from vqmoe_megatron.config.recipe import load_recipe
    from vqmoe_megatron.plan.layout import ParallelLayout
    from vqmoe_megatron.rundir.file_names import CONFIG_FILE
    from vqmoe_megatron.rundir.own_outputs import new_folder

    contents = inspect_checkpoint(Path(checkpoint))
    config = load_recipe(Path(contents.folder) / CONFIG_FILE, [])
    layout = ParallelLayout.from_config(replace(config, parallel=ParallelConfig()), 1)
    with new_folder(Path(out)) as partial:
        export = write_tables(contents, config, layout, partial, Path(out))
    return {"replaced": [layer.replaced_expert_bytes for layer in export.layers]}


def logits_here(recipe: str, overrides: list[str], tables: str) -> dict:
    """Return fp32 logits [SEQUENCES, S, V] of real text: ``model``, ``tables``, ``wrong`` with the
    rows of every table in another order, and before that, ``wrong memory`` with those of the code
    memory."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from vqmoe_megatron.config.recipe import load_recipe
    from vqmoe_megatron.moe.combine_gate import OnePath
    from vqmoe_megatron.moe.layer import VQMoELayer
    from vqmoe_megatron.train.preflight import check_run
    from vqmoe_megatron.train.stop_requests import StopRequests
    from vqmoe_megatron.train.trainer import Trainer
    from vqmoe_megatron.vq.memory_tables import load_code_memory
    from vqmoe_megatron.vq.table_layer import TableLayer, load_table_layer

    class InPlace(torch.nn.Module):
        """Answers as a VQMoE layer does; for path=dual keeps its continuous path alone."""

        def __init__(self, table: TableLayer, layer: VQMoELayer) -> None:
            super().__init__()
            self.table = table
            self.continuous = layer if layer.vq.path == "dual" else None
            layer.paths, layer.gate = layer.paths[:1], OnePath()

        def forward(self, hidden_states, *_args, **_kwargs):
            read = None
            if memory is not None:
                number, x = self.table.settings.layer_number, hidden_states.transpose(0, 1)
                read = memory.adds(number, x, tokens, positions == 0)
                read = None if read is None else read.transpose(0, 1)
            if self.continuous is None:
                return self.table(hidden_states, read), None
            y_continuous = self.continuous(hidden_states)[0]
            return self.table.combine(hidden_states, y_continuous, read), None

    config = load_recipe(Path(recipe), overrides)
    trainer = Trainer(check_run(config, 1, "cpu"), StopRequests({}))
    said = trainer.resume()
    model, seq_length = trainer.model[0].eval(), config.model.seq_length
    text = IndexedDataset(str(Path(config.data.path) / "valid"))
    tokens = torch.cat([torch.as_tensor(text[i], dtype=torch.int64) for i in range(len(text))])
    tokens = tokens[: SEQUENCES * seq_length].view(SEQUENCES, seq_length)
    # A document ends in the middle of every sequence.
    positions = torch.arange(seq_length).remainder(seq_length // 2 + 1).expand_as(tokens)
    memory = load_code_memory(tables) if config.code_memory.is_on else None

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(tokens, positions, None).float()

    found = {"said": said, "model": logits(), "numbers": []}
    for block in [m for m in model.modules() if isinstance(getattr(m, "mlp", None), VQMoELayer)]:
        number = block.mlp.layer_number
        found["numbers"].append(number)
        table = load_table_layer(Path(tables) / f"layer_{number:04d}.safetensors")
        block.mlp = InPlace(table, block.mlp)
    found["tables"] = logits()
    if memory is not None:
        for layer in memory.layers.values():
            layer.rows.copy_(layer.rows.roll(1, dims=0))
        found["wrong memory"] = logits()
        for layer in memory.layers.values():
            layer.rows.copy_(layer.rows.roll(-1, dims=0))
    for table in [m for m in model.modules() if isinstance(m, TableLayer)]:
        table.rows.copy_(table.rows.roll(1, dims=0))
    found["wrong"] = logits()
    return found
