"""PerturbDiff as published (Yuan et al. 2026): a diffusion over sets of cells, re-derived."""

from hilbertcell.models.perturbdiff.covariates import (
    NO_PERTURBATION,
    CovariateEncoder,
    init_covariate_encoder,
)
from hilbertcell.models.perturbdiff.denoiser import Denoiser, init_denoiser, source_index
from hilbertcell.models.perturbdiff.losses import energy_loss, squared_error
from hilbertcell.models.perturbdiff.objective import Batch, Draws, Dropout, LossTerms, denoising_loss, draw
from hilbertcell.models.perturbdiff.sampling import (
    ddim_sample,
    ddim_steps,
    ddpm_steps,
    dpm_steps,
    guided,
    sample,
    strided_times,
)
from hilbertcell.models.perturbdiff.schedule import (
    Schedule,
    cosine_schedule,
    diffuse,
    linear_schedule,
    power_cosine_schedule,
)
from hilbertcell.models.perturbdiff.state_dict import (
    StateDictError,
    covariate_encoder_from_state,
    from_state_dict,
    to_state_dict,
)
from hilbertcell.models.perturbdiff.training import Recipe, TrainInfo, TrainState

__all__ = [
    "NO_PERTURBATION",
    "Batch",
    "CovariateEncoder",
    "Denoiser",
    "Draws",
    "Dropout",
    "LossTerms",
    "Recipe",
    "Schedule",
    "StateDictError",
    "TrainInfo",
    "TrainState",
    "cosine_schedule",
    "covariate_encoder_from_state",
    "ddim_sample",
    "ddim_steps",
    "ddpm_steps",
    "denoising_loss",
    "diffuse",
    "dpm_steps",
    "draw",
    "energy_loss",
    "from_state_dict",
    "guided",
    "init_covariate_encoder",
    "init_denoiser",
    "linear_schedule",
    "power_cosine_schedule",
    "sample",
    "source_index",
    "squared_error",
    "strided_times",
    "to_state_dict",
]
