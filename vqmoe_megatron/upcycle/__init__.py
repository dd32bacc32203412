"""From a trained dense or SMoE model to a VQMoE that computes the same function at its start."""
