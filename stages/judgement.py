"""The order of the work: how an epoch of the U-Net is judged."""

from callbacks import Measured
from generate import lead_away
from metrics import Estimate

KID_FEATURES = "kid_features"  # of the best checkpoint's pictures, beside its weights


class Judgement:
    """What a `Keeper` asks at the end of an epoch: a picture, KID, and whether it is surely lower than the best's.

    Args:
        run: the `RunFolder`; of a best that is there already, the features are read.
        trainer: a `LatentDiffusionTrainer`.
        evaluation: the `EvaluationConfig` of the run.
        protocol: of the run's KID, a dict.
        shown_tokens: int32 (K, T), what the picture of each epoch is drawn from.

    Raises:
        InputError: the best is damaged.
    """

    def __init__(self, run, trainer, evaluation, protocol, shown_tokens):
        self._run, self._trainer, self._evaluation = run, trainer, evaluation
        self._protocol, self._shown_tokens = protocol, shown_tokens
        self._weak_step, self._measured = None, None
        best = run.best("diffusion")
        # By the step that drew: those of the best, and of the last that was measured.
        self._features = {best.step: best.tensors.get(KID_FEATURES)} if best else {}

    def ask(self, keeper):
        """Has the keeper ask here."""
        keeper.before_test, keeper.finish_row, keeper.choose = self.before_test, self.finish_row, self.choose

    def before_test(self, step):
        """Has the networks led away from what they were, see `lead_away`."""
        self._weak_step = lead_away(self._trainer.painter, self._run, self._evaluation, step)

    def finish_row(self, epoch, row):
        """Draws the epoch's picture; returns what the row says of KID, if it was measured."""
        path = self._run.sample_path(f"epoch_{epoch + 1:03d}.png")
        self._trainer.plot_images(self._shown_tokens, path)
        self._measured = self._measure(row["step"]) if "val_kid" in row else None
        if self._measured is None:
            return {}
        estimate, _, _, change = self._measured
        entries = {
            "low": estimate.low,
            "high": estimate.high,
            "floor": self._trainer.kid_metric.floor().value,
        }
        if change is not None:
            entries |= {"change": change.value, "change_low": change.low, "change_high": change.high}
        named = {f"val_kid_{name}": value for name, value in entries.items()}
        return {**named, "weak_step": self._weak_step, "protocol": self._protocol}

    def choose(self, row):
        """The `Measured` of the row that was finished last, or None."""
        return self._measured

    def _measure(self, step):
        kid, best = self._trainer.kid_metric, self._run.best_state("diffusion")
        own, former = kid.features(), self._features.get(best["step"]) if best else None
        self._features = {step: own} | ({best["step"]: former} if best else {})
        if best and best["step"] == step:  # a crash came after it was kept: what it was better than is gone
            change = best.get("change") and Estimate(*best["change"])
        else:  # `save_best` refuses other numbers of pictures by their protocol
            comparable = former is not None and former.shape == own.shape
            change = kid.less(former) if comparable else None
        state = {"weak_step": self._weak_step, "protocol": self._protocol, "change": change}
        return Measured(kid.estimate(), state, {KID_FEATURES: own}, change)
