"""Arithmetic of a run that needs no torch and no ranks: layout, bytes, operations, time, search."""
