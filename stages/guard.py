"""The order of the work: the guard that keeps a discriminator from taking an autoencoder's training over."""

import math
from typing import NamedTuple

from checkpoint import assign, collect

GOOD = "vae_good"  # stage name of the checkpoint to go back to
BACK_OFF = 0.1  # of the adversarial weight, where held-out PSNR has fallen
GAP_BACK_OFF = 0.5  # of it, where the discriminator tells everything apart
# Of the state: what counts, and the guard's own.
NEVER_BACK = ("iteration", "skipped", "skipped_in_row", "scale")


class Verdict(NamedTuple):
    """What to do after an epoch: go back to the last good weights, and the factor of the adversarial weight; why."""

    goes_back: bool
    factor: float
    reason: str | None


def verdict(row, former, settings):
    """What the guard does after an epoch.

    Held-out PSNR that has fallen by more than `guard_drop` dB from the best of the good epochs so far: the weights go
    back, and the adversarial weight to a tenth. An adversarial gradient of more than `guard_ratio` times the
    reconstruction's brings the weight down to that ratio (and to a tenth of that after a fall, so that it need not fall
    again); otherwise logits further apart than `guard_gap` halve it.

    Args:
        row: of this epoch: `val_psnr`, and `gradient_ratio` and `logit_gap` once the adversary has begun.
        former: the stage's rows before it.
        settings: a `config.AdversarialConfig`.
    """
    if "gen_loss" not in row:
        return Verdict(False, 1.0, None)
    good = [
        other["val_psnr"] for other in former if not other.get("went_back") and other["val_psnr"] is not None
    ]
    ratio, gap = _number(row["gradient_ratio"]), _number(row["logit_gap"])
    excess = ratio / settings.guard_ratio if ratio > settings.guard_ratio else 1.0
    fall = max(good, default=-math.inf) - _number(row["val_psnr"])
    if good and not fall <= settings.guard_drop:  # written so that NaN goes back too
        return Verdict(True, BACK_OFF / excess, f"held-out PSNR fell by {fall:.2f} dB")
    if excess > 1:
        told = f"the adversarial gradient was {ratio:.3g} times the reconstruction's"
        return Verdict(False, 1 / excess, told)
    if gap > settings.guard_gap:
        return Verdict(False, GAP_BACK_OFF, f"the discriminator's logits were {gap:.3g} apart")
    return Verdict(False, 1.0, None)


def _number(value):
    return math.nan if value is None else value


class Guard:
    """Acts on `verdict` after each epoch.

    Args:
        run: the `RunFolder`.
        trainer: a `VAETrainer` with an adversary.
        settings: the `AdversarialConfig`.
    """

    def __init__(self, run, trainer, settings):
        self._run, self._trainer, self._settings = run, trainer, settings

    def __call__(self, row):
        """Acts after the epoch of a row; returns what the row says of it."""
        goes_back, factor, reason = self._verdict(row)
        scale = self._trainer.adversary.scale
        entries = {"adversarial_scale": float(scale.numpy())}
        scale.assign(scale * factor)
        if goes_back:
            reason += f", so the weights went back to those of step {self._go_back()}"
            entries["went_back"] = True
        else:
            self._keep(row["step"])
        if reason:
            entries["guard"] = (
                f"guard: {reason}; the adversarial weight is now {float(scale.numpy()):.3g} of its own"
            )
        return entries

    def goes_back(self, row):
        """Whether it will go back after the epoch of a row."""
        return self._verdict(row).goes_back

    def _verdict(self, row):
        former = [other for other in self._run.rows() if other.get("stage") == "vae" and "val_psnr" in other]
        return verdict(row, former, self._settings)

    def _keep(self, step):
        tensors = {}
        for prefix, variables in self._trainer.kept_variables.items():
            tensors.update(collect(_states(variables), prefix))
        self._run.save(GOOD, step, tensors, {}, keep=1)

    def _go_back(self):
        good = self._run.latest(GOOD)
        for prefix, variables in self._trainer.kept_variables.items():
            assign(_states(variables), good.tensors, prefix, source=self._run.path)
        if (
            self._trainer.ema_vae is not None
        ):  # which was measured: beside it the raw weights may have been bad already
            self._trainer.vae.set_weights(self._trainer.ema_vae.get_weights())
        return good.step


def _states(variables):
    return [(name, variable) for name, variable in variables if name.split("/")[-1] not in NEVER_BACK]
