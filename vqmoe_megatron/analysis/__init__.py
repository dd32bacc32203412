"""What a run's records show as plots, and what trained models do (``vqmoe analyze``)."""
