"""Recording a run: metric names, metrics.jsonl, status.json, MLflow and the console."""
