"""The order of the work: how an epoch of the autoencoder is judged and shown, and what follows from it."""

import math

import numpy as np
import tensorflow as tf

from callbacks import Measured
from checkpoint import collect, named_variables
from evaluate import prior_sheet, reconstruction_sheet
from files import atomic_file
from input_pipeline import to_pixels
from metrics import KID, Estimate, mean_estimate, psnr, ssim
from stages.guard import Guard
from stages.progress import epochs_without, rate_scale
from trainer import at_once, decode_noise, losses, reconstruct

MEASURED = 2048  # held-out pictures, of more, that an epoch is measured on
PRIOR_SAMPLES = 16
HALVES = ("encoder", "decoder")  # which are kept apart, beside the whole


class Appraisal:
    """What a `Keeper` asks at the end of an epoch of the autoencoder.

    Sheets of reconstructions and of decoded noise; PSNR and SSIM, every so many epochs the perceptual distance and the
    KID of reconstructions (rKID), all with intervals; the best by `val_loss`; guard, plateau and early stopping.
    All that is decided follows from the rows of the log, so a resumed run decides the same.

    Args:
        run: the `RunFolder`.
        trainer: a compiled `VAETrainer`.
        config: the `Config` of the run.
        held_out: uint8 (N, H, W, 3).
        features: images -> features for rKID.
    """

    def __init__(self, run, trainer, config, held_out, features):
        self._run, self._trainer, self._stage = run, trainer, config.vae_training
        self._held_out, self._kid = held_out[:MEASURED], KID(features)
        self._shown = {"n": len(self._held_out), "image_size": self._held_out.shape[1]}
        self._guard, self._goes_back = (lambda row: {}), (lambda row: False)
        if trainer.adversary is not None and config.adversarial.guard:
            self._guard = Guard(run, trainer, config.adversarial)
            self._goes_back = self._guard.goes_back
        self._is_due = lambda epoch: False
        if self._stage.measure_every:
            last, every = self._stage.epochs - 1, self._stage.measure_every
            self._is_due = lambda epoch: epoch in (0, last) or (epoch + 1) % every == 0

    def ask(self, keeper):
        """Has the keeper ask here."""
        keeper.finish_row, keeper.choose, keeper.act = self.finish_row, self.choose, self.act

    def finish_row(self, epoch, row):
        """Saves the epoch's sheets and measures its reconstructions."""
        rebuilt = reconstruct(self._trainer.averaged_vae, self._held_out)
        self._save_sheets(epoch, rebuilt)
        entries = {"kl_weight": self._kl_weight(row["step"])}
        entries |= _entries("psnr", psnr(self._held_out, rebuilt))
        entries |= _entries("ssim", ssim(self._held_out, rebuilt))
        return entries | (self._measured(rebuilt) if self._is_due(epoch) else {})

    def _kl_weight(self, step):
        """The weight that the KL had in the epoch's last step."""
        stage = self._stage
        factor = losses.kl_factor(stage.kl_schedule, step - 1, stage.kl_warmup_steps, stage.kl_cycles)
        return stage.kl_weight * float(factor)

    def _save_sheets(self, epoch, rebuilt):
        vae, count = self._trainer.averaged_vae, len(rebuilt)
        # Pictures often lie in order of their classes, so the first ones would be alike.
        rows = np.linspace(0, count - 1, min(self._stage.previews, count)).astype(int)
        sheets = {"vae": reconstruction_sheet(self._held_out[rows], rebuilt[rows])}
        if not vae.skips:  # which decode nothing but pictures
            sheets["vae_prior"] = prior_sheet(decode_noise(vae, PRIOR_SAMPLES, self._held_out.shape[1]))
        for name, sheet in sheets.items():
            sheet.save(self._run.sample_path(f"{name}_{epoch + 1:03d}.png"))

    def _measured(self, rebuilt):
        """What is measured by networks that see, with how it is measured."""
        entries, seen = {}, self._trainer.perceptual
        if seen is not None:
            name = "lpips" if seen.name == "lpips" else "perceptual"
            entries |= _entries(name, mean_estimate(distances(seen, self._held_out, rebuilt)))
            entries[f"{name}_protocol"] = {**seen.protocol, **self._shown}
        if not self._kid.has_real:
            self._kid.set_real(self._kid.feature_network(self._held_out, progress=True))
        self._kid.reset_state()
        self._kid.update_state(None, rebuilt)
        protocol = {**self._kid.feature_network.protocol, **self._shown}
        floor = {"val_rkid_floor": self._kid.floor().value, "rkid_protocol": protocol}
        return entries | _entries("rkid", self._kid.estimate()) | floor

    def choose(self, row):
        """By `val_loss`, which has the KL's full weight and no adversarial loss, so that epochs compare.

        An epoch from which the guard goes back is none to choose.
        """
        value = row["val_loss"]
        if not math.isfinite(value) or self._goes_back(row):
            return None
        return Measured(Estimate(value, value, value), {"protocol": {"metric": "val_loss"}})

    def act(self, row):
        """Keeps the best's halves apart, calls the guard, and lowers the rate or stops where the loss stays."""
        if row["best"]:
            self._keep_halves(row)
        entries = self._guard(row)
        stage, losses = self._stage, self._losses(row)
        if stage.schedule == "plateau":
            former, scale = (
                rate_scale(seen, stage.plateau_epochs, stage.plateau_factor) for seen in (losses[:-1], losses)
            )
            if scale != former:
                entries["rate"] = f"val_loss stays, so the learning rate is now {scale:.3g} of its schedule"
            for own in self._trainer.optimizers_in_use:
                own.rate_scale.assign(scale)
        if stage.early_stopping and epochs_without(losses) >= stage.early_stopping:
            entries["stopped"] = f"stopped: {stage.early_stopping} epochs without a lower val_loss"
        return entries

    def _losses(self, row):
        """`val_loss` of the stage's epochs up to this row, all as the log keeps them: None where it is no number."""
        own = [other for other in self._run.rows() if other.get("stage") == row["stage"]]
        former = [None if other.get("went_back") else other["val_loss"] for other in own]
        return [*former, row["val_loss"] if math.isfinite(row["val_loss"]) else None]

    def _keep_halves(self, row):
        value = row["val_loss"]
        for name in HALVES:
            tensors = collect(named_variables(getattr(self._trainer.averaged_vae, name)), name)
            state = {"epoch": row["epoch"], "step": row["step"], "protocol": {"metric": "val_loss"}}
            self._run.save_best(name, value, value, value, tensors, state)


def distances(distance, images, rebuilt, batch_size=None):
    """The perceptual distance of each pair, float64 (N,), of images uint8 (N, H, W, 3); `distance` as of a trainer."""

    @tf.function(reduce_retracing=True, autograph=False)
    def of_batch(one, other):
        return distance(*(to_pixels(images) for images in (one, other)))

    batch_size = batch_size or at_once(images.shape[1], most=16)
    starts = range(0, len(images), batch_size)
    cut = [[tf.constant(part[start : start + batch_size]) for part in (images, rebuilt)] for start in starts]
    return np.concatenate([np.asarray(of_batch(*pair), "float64") for pair in cut])


def _entries(name, estimate):
    return {f"val_{name}{end}": value for end, value in zip(("", "_low", "_high"), estimate, strict=True)}


def save_plot(plot, path, *arguments):
    """plot(*arguments, file) into a file that is there as a whole or not at all."""
    with atomic_file(path) as file:
        plot(*arguments, file)
