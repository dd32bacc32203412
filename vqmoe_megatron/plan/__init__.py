"""Arithmetic of a run that needs no torch and no ranks: layouts, ownership, rank coordinates."""
