"""How weights follow their gradients: AdamW and Muon, their learning rate, and what they leave undecayed."""

import math

import keras
import tensorflow as tf

UNDECAYED = ("bias", "gamma", "beta", "embeddings")
# Of the loss in 16 bits (Micikevicius et al. 2018, section 3.2): it begins here, halves at each step that is not
# finite, and doubles after so many in a row that are.
FIRST_LOSS_SCALE, STEPS_TO_DOUBLE = 2.0**15, 2000
FINAL_LEARNING_RATE = 0.01  # of the peak, at the end of the cosine decay
# Newton-Schulz, x -> a x + b x (x'x) + c x (x'x)^2, each step with its own a, b, c: of all such three, these take
# singular values of 0.01 to 1 nearest to 1, to 0.73 to 1.27, as each is the best there is for what the one before it
# leaves (Amsel et al. 2025, "The Polar Express", theorem 3.1). Five steps of Jordan et al.'s single triple leave 0.68
# to 1.2; smaller singular values they lift further.
NEWTON_SCHULZ = ((8.0934, -23.6205, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))
MUON_MOMENTUM = 0.95
MUON_RMS = 0.2  # root mean square of an update at a learning rate of 1, about that of Adam's
# Parts of the paths of variables that are no hidden matrices, see `Muon`.
NOT_FOR_MUON = ("embeddings", "conv_in", "conv_out", "quant_conv", "log_variance")


class AdamW(keras.optimizers.AdamW):
    """Keras' AdamW (Loshchilov & Hutter 2019), whose clipping sees the gradient of the whole batch.

    Keras clips each replica's gradient and sums afterwards, so that N replicas take up to N times the step of
    one. Here the sum over replicas comes first.

    A step whose gradient holds a NaN or an infinity, on any replica, is skipped on all: weights and moments stay to the
    bit, and only `iterations` counts it.

    Takes Keras' arguments, but no `amsgrad`, and no clipping but by the global norm.

    Args:
        scales_loss: whether gradients come of a loss times `loss_scale`, as float16 needs it; they are divided by it.

    Attributes:
        loss_scale: the factor that the loss needs, 1 without `scales_loss`.
        skipped: steps that were skipped.
        skipped_in_row: of them, those since the last one that was not.
        rate_scale: factor of the learning rate, 1 unless somebody assigns another.

    Raises:
        ValueError: `amsgrad` or another clipping is asked for.
    """

    def __init__(self, *args, scales_loss=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.scales_loss = scales_loss
        if self.amsgrad:
            raise ValueError("the fused update has no amsgrad. Received: amsgrad=True")
        if self.clipnorm or self.clipvalue:
            raise ValueError(
                "gradients are clipped by the norm of all, global_clipnorm. "
                f"Received: clipnorm={self.clipnorm}, clipvalue={self.clipvalue}"
            )

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._add_counters()

    def _add_counters(self):
        alike = {"shape": (), "aggregation": "only_first_replica"}
        self.skipped = self.add_variable(dtype="int32", name="skipped", **alike)
        self.skipped_in_row = self.add_variable(dtype="int32", name="skipped_in_row", **alike)
        self.rate_scale = self.add_variable(initializer="ones", name="rate_scale", **alike)
        if self.scales_loss:
            first = keras.initializers.Constant(FIRST_LOSS_SCALE)
            self._loss_scale = self.add_variable(initializer=first, name="loss_scale", **alike)
            self._since_change = self.add_variable(dtype="int32", name="since_change", **alike)

    @property
    def loss_scale(self):
        return self._loss_scale.value if self.scales_loss else 1.0

    def _follow_loss_scale(self, is_finite):
        """Halves it after a step that is not finite, doubles it after many that are."""
        steps = (self._since_change.value + 1) * tf.cast(is_finite, tf.int32)
        doubles = steps >= STEPS_TO_DOUBLE
        factor = tf.where(is_finite, tf.where(doubles, 2.0, 1.0), 0.5)
        self._loss_scale.assign(tf.maximum(1.0, self._loss_scale.value * factor))
        self._since_change.assign(tf.where(doubles, 0, steps))

    def apply(self, grads, trainable_variables=None):
        # An embedding's gradient names a row as often as its word occurs: squares are right only of their sum.
        grads = [tf.convert_to_tensor(grad) for grad in grads]
        replica = tf.distribute.get_replica_context()
        if replica is not None and replica.num_replicas_in_sync > 1:
            grads = replica.all_reduce(tf.distribute.ReduceOp.SUM, grads)
        return super().apply(grads, trainable_variables)

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        """Keras' update, with the kernel's numbers made once and not for every variable."""
        # Moments have seen the steps that were not skipped, and this one.
        seen = tf.cast(self.iterations + 1, tf.float32) - tf.cast(self.skipped.value, tf.float32)
        step = tf.maximum(1.0, seen)
        # Without a share of the gradient, which is 0 then, and with a rate of 0, all stays as it is.
        betas = {
            "beta1": 1.0 - (1.0 - self.beta_1) * self._counts,
            "beta2": 1.0 - (1.0 - self.beta_2) * self._counts,
        }
        powers = {"beta1_power": tf.pow(self.beta_1, step), "beta2_power": tf.pow(self.beta_2, step)}
        self._numbers = {
            name: tf.convert_to_tensor(value)
            for name, value in (betas | powers | {"epsilon": self.epsilon}).items()
        }
        learning_rate = self._rate_of_step(learning_rate)
        self._decay_rate = learning_rate * (self.weight_decay or 0.0)
        super()._backend_update_step(grads, trainable_variables, learning_rate)

    def _rate_of_step(self, learning_rate):
        """The learning rate as it was scaled; 0 where the step is skipped."""
        return learning_rate * self.rate_scale.value * self._counts

    def _clip_gradients(self, grads):
        """Clips by the norm of all, and counts a gradient that is not finite, of which it leaves zeros."""
        norm = tf.linalg.global_norm(grads) / self.loss_scale
        is_finite = tf.math.is_finite(norm)
        self._counts = tf.cast(is_finite, tf.float32)
        skips = tf.cast(~is_finite, tf.int32)
        self.skipped.assign(self.skipped + skips)
        self.skipped_in_row.assign((self.skipped_in_row + skips) * skips)
        shrink = tf.minimum(1.0, self.global_clipnorm / norm) if self.global_clipnorm else 1.0
        factor = tf.where(is_finite, shrink / self.loss_scale, 0.0)
        if self.scales_loss:
            self._follow_loss_scale(is_finite)
        return [tf.math.multiply_no_nan(grad, factor) for grad in grads]  # of NaN and 0 it makes 0

    def _apply_weight_decay(self, variables):
        """Left to `update_step`: here Keras would trace the learning rate anew for every variable."""

    def _decay(self, variable):
        if self.weight_decay and self._use_weight_decay(variable):
            variable.assign_sub(variable * tf.cast(self._decay_rate, variable.dtype))

    def update_step(self, gradient, variable, learning_rate):
        """Adam's update of one variable by TensorFlow's fused kernel: Keras' dozen small ones take longer to
        trace, and each goes over the memory again."""
        self._decay(variable)
        index = self._get_variable_index(variable)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            lr=tf.cast(learning_rate, variable.dtype),
            grad=tf.cast(gradient, variable.dtype),
            **{name: tf.cast(number, variable.dtype) for name, number in self._numbers.items()},
        )

    def _all_reduce_sum_gradients(self, grads_and_vars):
        return list(grads_and_vars)


class Muon(AdamW):
    """Muon (Jordan et al. 2024): the momentum of every matrix, made orthogonal, is the step.

    All directions of a weight matrix learn equally fast, instead of those that the gradients favour. The kernel
    of a convolution counts as a matrix of (height * width * input, output channels). Steps are scaled by 0.2
    sqrt(longer side), so that a learning rate and a weight decay mean about what they mean to AdamW (Liu et al. 2025,
    arXiv 2502.16982).

    It is for hidden matrices: vectors, embeddings, and the first and last layer of each network follow AdamW, as Jordan
    et al. advise. Those layers are `conv_in` and `conv_out` of the U-Net, the encoder and the decoder; `quant_conv` and
    `post_quant_conv` are part of the encoder's last and the decoder's first, as no nonlinearity lies between.

    Keras' own Muon leaves convolutions to AdamW.
    """

    def build(self, variables):
        if self.built:
            return
        keras.optimizers.Optimizer.build(self, variables)  # not Adam's, which keeps squares of matrices too
        self._momentums = self.add_optimizer_variables(variables, "momentum")
        adams = [variable for variable in variables if not is_matrix(variable)]
        squares = iter(self.add_optimizer_variables(adams, "velocity"))
        self._velocities = [None if is_matrix(variable) else next(squares) for variable in variables]
        self._add_counters()

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        """Keras' update, where (momentum, step) take the place of each matrix's gradient."""
        grads = list(grads)
        places = {}  # of the matrices, by their sides: those of one shape take their steps together
        for place, variable in enumerate(trainable_variables):
            if is_matrix(variable):
                rows, columns = _sides(variable)
                places.setdefault((rows, columns), []).append(place)
        for sides, chosen in places.items():
            kept = [self._momentums[self._get_variable_index(trainable_variables[place])] for place in chosen]
            momentums = tf.stack([tf.reshape(momentum.value, sides) for momentum in kept])
            gradients = tf.stack([tf.reshape(grads[place], sides) for place in chosen])
            momentums += (1 - MUON_MOMENTUM) * self._counts * (gradients - momentums)
            # Nesterov's: moved by this gradient once more.
            ahead = momentums + (1 - MUON_MOMENTUM) * (gradients - momentums)
            directions = MUON_RMS * math.sqrt(max(sides)) * orthogonalised(ahead)
            steps = tf.cast(self._rate_of_step(learning_rate), directions.dtype) * directions
            for place, *parts in zip(chosen, tf.unstack(momentums), tf.unstack(steps), strict=True):
                grads[place] = tuple(parts)
        super()._backend_update_step(grads, trainable_variables, learning_rate)

    def update_step(self, gradient, variable, learning_rate):
        if not isinstance(gradient, tuple):
            return super().update_step(gradient, variable, learning_rate)
        self._decay(variable)
        momentum, step = (tf.reshape(part, variable.shape) for part in gradient)
        self._momentums[self._get_variable_index(variable)].value.assign(momentum)
        variable.assign_sub(step)


def is_matrix(variable):
    """Whether `Muon` treats a Keras variable as a matrix."""
    return len(variable.shape) >= 2 and not any(name in variable.path for name in NOT_FOR_MUON)


def _sides(variable):
    """(rows, columns) of a kernel as a matrix: all its inputs, its outputs."""
    *inputs, outputs = variable.shape
    return math.prod(inputs), outputs


def orthogonalised(matrices):
    """The nearest (semi-)orthogonal matrices, roughly: singular values of 0.7 to 1.3 in place of those from 0.01
    to 1 of the matrices' norm, and smaller ones for smaller.

    Newton-Schulz on the smaller Gram matrix: x is multiplied once, at the end, by the product of all steps'
    polynomials, which all commute.

    Args:
        matrices: float32 (N, R, C).

    Returns:
        float32 (N, R, C); matrices of zeros stay zeros.
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        return tf.linalg.matrix_transpose(orthogonalised(tf.linalg.matrix_transpose(matrices)))
    matrices = matrices / (tf.norm(matrices, axis=(-2, -1), keepdims=True) + 1e-7)
    gram = tf.matmul(matrices, matrices, transpose_a=True)  # (N, C, C)
    identity, product = tf.eye(matrices.shape[-1]), None
    for a, b, c in NEWTON_SCHULZ:
        polynomial = a * identity + b * gram + c * tf.matmul(gram, gram)
        product = polynomial if product is None else tf.matmul(product, polynomial)
        gram = tf.matmul(tf.matmul(gram, polynomial), polynomial)
    return tf.matmul(matrices, product)


def warmup_cosine(peak, steps, warmup_steps, final=FINAL_LEARNING_RATE):
    """A learning rate that climbs linearly to `peak` and falls along a cosine to a share `final` of it.

    Args:
        peak: largest learning rate.
        steps: all steps of the training.
        warmup_steps: steps of the climb.
        final: the share that is left at the end; 1 stays at the peak.
    """
    warmup_steps = min(warmup_steps, max(1, steps // 2))
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=peak / max(1, warmup_steps),
        warmup_target=peak,
        warmup_steps=warmup_steps,
        decay_steps=max(1, steps - warmup_steps),
        alpha=final,
    )


def adamw(variables, *, learning_rate, weight_decay, clip_norm, **settings):
    """An `AdamW`, built for `variables`, that leaves biases, norms and embeddings undecayed.

    Further keywords are its own, such as `beta_1` and a `name`, which a second optimizer in a checkpoint needs.
    """
    return _built(AdamW, variables, learning_rate, weight_decay, clip_norm, settings)


def muon(variables, *, learning_rate, weight_decay, clip_norm, **settings):
    """A `Muon`, built for `variables`, in the same way."""
    return _built(Muon, variables, learning_rate, weight_decay, clip_norm, settings)


OPTIMIZERS = {"adamw": adamw, "muon": muon}


def _built(kind, variables, learning_rate, weight_decay, clip_norm, settings):
    # Keras numbers the optimizers of a process: their variables would have other names on resume.
    defaults = {"beta_2": 0.99, "name": kind.__name__.lower()}
    optimizer = kind(
        learning_rate,
        scales_loss=keras.config.dtype_policy().compute_dtype == "float16",
        weight_decay=weight_decay,
        global_clipnorm=clip_norm or None,
        **(defaults | settings),
    )
    optimizer.exclude_from_weight_decay(var_names=UNDECAYED)
    optimizer.build(variables)
    return optimizer
