"""Models of this package as Hugging Face reads them: export, import, and the modelling file."""
