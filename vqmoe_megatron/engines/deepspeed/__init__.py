"""DeepSpeed as the engine: ZeRO 0 to 2 over data and expert parallelism."""
