"""Checkpoints: what they hold, saving, loading at any layout, looking into them, exporting."""
