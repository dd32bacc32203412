"""The directory of a run: the names of its files, how they are written, who holds it."""
