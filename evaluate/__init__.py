"""Draws through `generate`, measures through `metrics`, writes the report."""

from evaluate.captions import follows_captions
from evaluate.curves import plot_curves, plot_sweep, plot_vae_curves
from evaluate.latents import latent_report, latent_scale, plot_latents
from evaluate.reconstructions import prior_sheet, reconstruction_sheet
from evaluate.tracked import plot_tracked

__all__ = [
    "follows_captions",
    "latent_report",
    "latent_scale",
    "plot_curves",
    "plot_latents",
    "plot_sweep",
    "plot_tracked",
    "plot_vae_curves",
    "prior_sheet",
    "reconstruction_sheet",
]
