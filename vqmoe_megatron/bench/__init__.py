"""``vqmoe bench``: the layer against Megatron's, against the release, and against itself."""
