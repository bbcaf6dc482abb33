"""The other side of an autoencoder's adversarial training: a discriminator, and how much its judgement counts."""

import keras
import tensorflow as tf
from keras import ops

from trainer import losses


class Adversary:
    """A discriminator that learns to tell an autoencoder's pictures from real ones, and how that counts.

    The autoencoder's adversarial loss has the weight `weight` x `scale` x lambda. With `adaptive`, lambda makes the
    gradient of the adversarial loss as large as that of the reconstruction's, in the decoder's last layer (Esser et al.
    2021, equation 7); else it is 1.

    Args:
        discriminator: a `model.discriminator.PatchDiscriminator`.
        loss: "hinge", "vanilla" or "non-saturating", see `trainer.losses`.
        weight: of the autoencoder's adversarial loss.
        start: steps of the autoencoder before the discriminator begins to learn and to count.
        adaptive: see above.
        limit: the largest lambda.
        r1_weight: gamma of the R1 penalty (Mescheder et al. 2018); 0 leaves it out.
        lecam_weight: of LeCam's regularisation (Tseng et al. 2021); 0 leaves it out.

    Attributes:
        scale: a Keras variable, 1 unless somebody assigns another, such as a guard against domination.
        names: of what the trainer reports of a step, beside its own losses.
    """

    def __init__(
        self,
        discriminator,
        loss="hinge",
        weight=0.5,
        start=0,
        adaptive=True,
        limit=1e4,
        r1_weight=0.0,
        lecam_weight=0.0,
    ):
        self.discriminator, self.loss, self.weight, self.start = discriminator, loss, weight, start
        self.adaptive, self.limit = adaptive, limit
        self.r1_weight, self.lecam_weight = r1_weight, lecam_weight
        self.scale = _number(1.0, "scale")
        self.average_real, self.average_fake = _number(0.0, "average_real"), _number(0.0, "average_fake")
        self.names = ["gen_loss", "disc_loss", "adversarial_weight", "gradient_ratio", "logit_gap"]
        self.names += ["r1_loss"] * bool(r1_weight) + ["lecam_loss"] * bool(lecam_weight)

    @property
    def variables(self):
        """(name, Keras variable) of what it keeps beside the discriminator."""
        names = ("scale", "average_real", "average_fake")
        return [(name, getattr(self, name)) for name in names]

    def judge(self, pixels, reconstruction):
        """The losses of both sides, (B,) each by name, and the logits' means over patches, for a batch.

        Args:
            pixels, reconstruction: (B, H, W, 3).

        Returns:
            dict of `gen_loss`, which the autoencoder minimises; `disc_total`, which the discriminator does; its part
            `disc_loss`, and `r1_loss` and `lecam_loss` where they have weights; `real` and `fake`, the logits' means.
        """
        fake = self.discriminator(reconstruction, training=True)
        real, penalty = self._real_logits(pixels)
        judged = {
            "gen_loss": losses.generator_loss(self.loss, fake),
            "disc_loss": losses.discriminator_loss(self.loss, real, fake),
            "logit_gap": losses.logit_gap(real, fake),
            "real": ops.mean(ops.cast(real, "float32"), axis=(1, 2, 3)),
            "fake": ops.mean(ops.cast(fake, "float32"), axis=(1, 2, 3)),
        }
        total = judged["disc_loss"]
        if self.r1_weight:
            judged["r1_loss"] = penalty
            total = total + 0.5 * self.r1_weight * penalty
        if self.lecam_weight:
            averages = self.average_real.value, self.average_fake.value
            judged["lecam_loss"] = losses.lecam(judged["real"], judged["fake"], *averages)
            total = total + self.lecam_weight * judged["lecam_loss"]
        return judged | {"disc_total": total}

    def _real_logits(self, pixels):
        """The logits of real pictures, and their R1 penalty (B,) where it has a weight."""
        if not self.r1_weight:
            return self.discriminator(pixels, training=True), None
        with tf.GradientTape() as tape:
            tape.watch(pixels)
            logits = self.discriminator(pixels, training=True)
            # A mean over patches, as the losses are: so the penalty's weight means the same at any size.
            total = ops.sum(ops.mean(ops.cast(logits, "float32"), axis=(1, 2, 3)))
        return logits, losses.r1(tape.gradient(total, pixels))

    def weighed(self, norm_reconstruction, norm_adversarial):
        """The weight of the adversarial loss, and the ratio of its gradient's norm to the reconstruction's.

        Args:
            norm_reconstruction, norm_adversarial: of the gradients in the decoder's last kernel, of the whole batch.
        """
        scale = self.weight * self.scale.value
        if self.adaptive:
            scale = scale * losses.adaptive_weight(norm_reconstruction, norm_adversarial, self.limit)
        return scale, scale * norm_adversarial / (norm_reconstruction + 1e-12)

    def follow(self, mean_real, mean_fake):
        """Moves the averages of the logits towards their means over the whole batch."""
        means = ((self.average_real, mean_real), (self.average_fake, mean_fake))
        for average, mean in means:
            new = losses.lecam_average(average.value, mean)
            average.assign(tf.where(tf.math.is_finite(new), new, average.value))


def _number(first, name):
    return keras.Variable(first, trainable=False, name=name, aggregation="only_first_replica")
