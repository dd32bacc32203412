"""Starting runs: ranks on this machine, jobs of a Slurm queue."""
