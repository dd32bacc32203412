"""The GPU proof: one command that settles on one GPU, in half an hour, what the CPU cannot show.

``python -m vqmoe_megatron.gpu_proof --out DIR`` or ``make gpu``. See ``proof.py`` for how its parts
are run, and ``part.py`` for which there are.
"""
