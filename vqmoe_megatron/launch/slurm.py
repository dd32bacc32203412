"""srun: one rank per task of a Slurm step."""

from __future__ import annotations

from collections.abc import Mapping

from vqmoe_megatron.launch.substrate import Substrate


class Slurm(Substrate):
    """``srun`` inside a job."""

    variables = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    starter = "srun"

    def is_here(self, environ: Mapping[str, str]) -> bool:
        """sbatch itself sets SLURM_NTASKS and SLURM_PROCID=0; only srun sets SLURM_STEP_ID."""
        return "SLURM_STEP_ID" in environ and super().is_here(environ)
