"""Training steps counted without training: balanced routing, and worlds that are not there."""
