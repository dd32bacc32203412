"""Scaling studies: grids of runs described in one file, run, submitted, watched and reported."""
