"""The parts of an analysis: what each asks of one model, and the section it makes of all models."""
