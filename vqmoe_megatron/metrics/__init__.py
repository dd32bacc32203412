"""What a run measures: one row per metric, from which every writer and reader derives the rest."""
