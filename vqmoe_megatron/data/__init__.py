"""Text to tokens to microbatches: preparing, describing, loading and evaluating corpora."""
