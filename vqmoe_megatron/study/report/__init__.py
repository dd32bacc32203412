"""The report of a study: one table of its runs, plots, a fitted scaling law, a page to read."""
