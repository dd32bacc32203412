"""MLflow: shipped in the background, replayed where it was away."""
