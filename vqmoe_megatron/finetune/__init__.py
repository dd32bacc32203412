"""Fine-tuning runs of one checkpoint: modes and seeds, and the table of all."""
