"""Tasks: what a batch is, what the loss is, how a model is scored; one file each."""
