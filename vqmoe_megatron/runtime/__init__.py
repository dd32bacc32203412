"""Where a run lives: devices, ranks, process groups, the CPU compatibility file."""
