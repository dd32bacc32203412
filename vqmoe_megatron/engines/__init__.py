"""Training engines: what builds a model and takes its steps."""
