"""Images -> numbers, with their protocol. Never generates, never loads a run."""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import keras
import numpy as np

from config import FEWEST_FOR_KID

FEWEST_FOR_FLOOR = 2 * FEWEST_FOR_KID  # real pictures, of which the floor compares two halves
_NORMAL_97_5 = 1.959964  # quantile of the standard normal: a two-sided 95 % interval


_GAUSSIAN = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
_SSIM_WINDOW = _GAUSSIAN / _GAUSSIAN.sum()  # along one side


class Estimate(NamedTuple):
    """A measured number and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self):
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


_UNKNOWN = Estimate(float("nan"), float("nan"), float("nan"))


@dataclass(frozen=True)
class Protocol:
    """All that a KID depends on besides the pictures; a run folder refuses to compare unlike protocols."""

    network: str  # feature network
    weights: str  # sha256 of its weights
    resize: str  # filter
    size: int  # side of the pictures that the network sees
    n_real: int
    n_generated: int
    sampler: str
    spacing: str  # of the sampler's times
    steps: int
    guidance: float
    guidance_from: float  # least diffusion time of guidance
    guidance_to: float  # and most
    autoguidance: float
    weak: float  # the share of the training that the weak model was asked to be of
    ema: bool  # whether the averaged network drew
    seed: int

    def to_dict(self):
        return asdict(self)


def kid(real, generated, *, block=1024):
    """Kernel inception distance: the unbiased estimate of MMD^2 over all features at once.

    Binkowski et al. 2018 (arXiv:1801.01401), with their kernel k(a, b) = (a.b / D + 1)^3; the estimator is
    Gretton et al. 2012, eq. 3. It is unbiased, so it may be negative. One estimate over everything has less
    variance than their average over subsets, which is the same thing with most of the pairs thrown away.

    The interval is value +- 1.96 standard errors. Those come from the delete-one jackknife of a two-sample
    U-statistic (Arvesen 1969; Efron & Stein 1981 show that its variance is never too small on average), which
    needs no more than the row sums of the kernel matrices.

    Arguments:
        real: (N, D) features.
        generated: (M, D) features.
        block: rows of a kernel matrix held at once; bounds memory to block * max(N, M) numbers.

    Returns:
        Estimate; all NaN when a feature is not finite.

    Raises:
        ValueError: shapes that do not fit, or fewer pictures on a side than `FEWEST_FOR_KID`.
    """
    real, generated = _checked_features(real), _checked_features(generated)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features: received dimensions {real.shape[1]} and {generated.shape[1]}, expected one"
        )
    if not (np.isfinite(real).all() and np.isfinite(generated).all()):
        return _UNKNOWN
    return _jackknifed(*_leave_one_out(real, generated, block))


def kid_difference(real, generated, other, *, block=1024):
    """KID of `generated` less KID of `other`, drawn from the same captions and noise: picture i with picture i.

    The pairs leave the estimate together, so what they share does not widen the interval, as it does that of each.

    Arguments:
        real: (N, D) features.
        generated, other: (M, D) features.
        block: see `kid`.

    Returns:
        Estimate; all NaN when a feature is not finite.

    Raises:
        ValueError: shapes that do not fit, or too few pictures.
    """
    real, generated, other = map(_checked_features, (real, generated, other))
    if not real.shape[1] == generated.shape[1] == other.shape[1] or len(generated) != len(other):
        raise ValueError(
            f"features: received shapes {real.shape}, {generated.shape} and {other.shape}, "
            "expected one dimension, and pairs"
        )
    if not all(np.isfinite(features).all() for features in (real, generated, other)):
        return _UNKNOWN
    one, two = (_leave_one_out(real, features, block) for features in (generated, other))
    return _jackknifed(*(a - b for a, b in zip(one, two, strict=True)))


def kid_floor(real, *, n=None, seed=0, block=1024):
    """KID between two disjoint random parts of the real pictures: what a perfect model would get.

    Arguments:
        real: (N, D) features.
        n: pictures in each part; None is half of them. More than half is cut to half.
        seed: of the split.
        block: see `kid`.

    Returns:
        Estimate, whose expectation is 0; its interval tells how small a KID can be seen.
    """
    real = np.asarray(real)
    half = min(n or len(real), len(real) // 2)
    order = np.random.default_rng(seed).permutation(len(real))
    return kid(real[order[:half]], real[order[half : 2 * half]], block=block)


def _checked_features(features):
    features = np.asarray(features, "float64")
    if features.ndim != 2 or len(features) < FEWEST_FOR_KID:
        raise ValueError(
            f"features: received shape {features.shape}, expected (at least {FEWEST_FOR_KID}, D)"
        )
    return features


def _kernel(a, b):
    return (a @ b.T / a.shape[1] + 1.0) ** 3


def _row_sums(a, b, block):
    """Returns sum over j of k(a_i, b_j), (N,), holding `block` rows of the kernel matrix at a time."""
    return np.concatenate([_kernel(a[i : i + block], b).sum(axis=1) for i in range(0, len(a), block)])


def _self_kernel(a):
    return ((a * a).sum(axis=1) / a.shape[1] + 1.0) ** 3


def _leave_one_out(real, generated, block):
    """KID, and KID without real picture i (N,), and without generated picture i (M,)."""
    within_real = _row_sums(real, real, block) - _self_kernel(real)
    within_generated = _row_sums(generated, generated, block) - _self_kernel(generated)
    real_to_generated = _row_sums(real, generated, block)
    generated_to_real = _row_sums(generated, real, block)
    n, m = len(real), len(generated)
    in_real, in_generated = within_real.sum() / (n * (n - 1)), within_generated.sum() / (m * (m - 1))
    across = real_to_generated.sum() / (n * m)
    value = in_real + in_generated - 2 * across
    # The estimate without picture i, for every i: its row (and column) leave the sums.
    without_real = _mean_without(within_real) + in_generated - 2 * _cross_without(real_to_generated, m)
    without_generated = in_real + _mean_without(within_generated) - 2 * _cross_without(generated_to_real, n)
    return value, without_real, without_generated


def _jackknifed(value, without_real, without_generated):
    error = np.sqrt(_jackknife_variance(without_real) + _jackknife_variance(without_generated))
    return Estimate(float(value), float(value - _NORMAL_97_5 * error), float(value + _NORMAL_97_5 * error))


def _mean_without(row_sums):
    n = len(row_sums)
    return (row_sums.sum() - 2 * row_sums) / ((n - 1) * (n - 2))


def _cross_without(row_sums, columns):
    return (row_sums.sum() - row_sums) / ((len(row_sums) - 1) * columns)


def _jackknife_variance(estimates):
    n = len(estimates)
    return (n - 1) / n * np.square(estimates - estimates.mean()).sum()


class KID(keras.metrics.Metric):
    """KID as a Keras metric: gathers features on the host, gives one unbiased estimate over all of them.

    Call it eagerly (a callback, an own loop): pictures leave the graph before they are measured. An average of
    KID over batches would be noisy, and its noise would choose the checkpoint.

    Arguments:
        feature_network: images uint8 (B, H, W, 3) -> features (B, D), such as
            `model.perceptual.FeatureNetwork`.
        name: of the metric.
    """

    def __init__(self, feature_network, name="kid"):
        super().__init__(name=name)
        self.feature_network = feature_network
        self._fixed_real = None
        self.reset_state()

    @property
    def has_real(self):
        """Whether `set_real` has been called."""
        return self._fixed_real is not None

    def set_real(self, features):
        """Keeps the real pictures' features (N, D) for good, so that no epoch computes them again."""
        self._fixed_real = _checked_features(features)

    def update_state(self, real_images, generated_images, sample_weight=None):
        """Gathers pictures, uint8 (B, H, W, 3). `real_images` is None once `set_real` was called, and only then.

        Raises:
            ValueError: real pictures given twice or not at all; `sample_weight` given.
        """
        if sample_weight is not None:
            raise ValueError("KID: received sample_weight, expected None; every picture counts once")
        if (real_images is None) != (self._fixed_real is not None):
            raise ValueError(
                "KID: real pictures come either from set_real or from update_state, not both or neither"
            )
        if real_images is not None:
            self._real.append(self.feature_network(real_images))
        self._generated.append(self.feature_network(generated_images))

    def result(self):
        """Returns the value alone; NaN while too few pictures are gathered."""
        return self.estimate().value

    def estimate(self):
        """Returns the Estimate with its interval; NaN while too few pictures are gathered."""
        real, generated = self._gathered_real(), self._gathered_generated()
        if min(len(real), len(generated)) < FEWEST_FOR_KID:
            return _UNKNOWN
        return kid(real, generated)

    def features(self):
        """The features of the generated pictures that are gathered, (M, D)."""
        return self._gathered_generated()

    def less(self, other):
        """This KID less that of other features (M, D), of the same captions and noise, see `kid_difference`."""
        return kid_difference(self._gathered_real(), self._gathered_generated(), other)

    def floor(self, seed=0):
        """Returns the real-against-real Estimate with as many pictures a side as were generated, if there are.

        It is NaN where there are fewer than `FEWEST_FOR_FLOOR` real pictures.
        """
        real, n = self._gathered_real(), len(self._gathered_generated())
        if len(real) < FEWEST_FOR_FLOOR:
            return _UNKNOWN
        return kid_floor(real, n=max(n, FEWEST_FOR_KID), seed=seed)

    def reset_state(self):
        """Forgets what was gathered; what `set_real` was given stays."""
        self._real, self._generated = [], []

    def _gathered_real(self):
        return _joined(self._real) if self._fixed_real is None else self._fixed_real

    def _gathered_generated(self):
        return _joined(self._generated)


def _joined(batches):
    return np.concatenate(batches) if batches else np.empty((0, 1))


def psnr(images_a, images_b):
    """Peak signal-to-noise ratio in dB, the mean over pictures with its interval.

    Arguments:
        images_a, images_b: uint8 (B, H, W, 3) of one shape.

    Returns:
        Estimate: mean of 10 log10(255^2 / MSE) over pictures +- 1.96 standard errors; infinite where a pair is
        equal, and with an infinite interval for a single pair.

    Raises:
        ValueError: dtypes or shapes that do not fit, or no picture.
    """
    _check_pairs("psnr", images_a, images_b)
    errors = np.array([_mean_square(a, b) for a, b in zip(images_a, images_b, strict=True)])
    with np.errstate(divide="ignore"):
        decibels = 10 * np.log10(255.0**2 / errors)
    return mean_estimate(decibels)


def _mean_square(a, b):
    return np.square(a.astype("float32") - b.astype("float32")).mean(dtype="float64")


def ssim(images_a, images_b):
    """Structural similarity (Wang et al. 2004), 1 for equal pictures, the mean over pictures with its interval.

    Theirs is the window, 11x11 and Gaussian of sigma 1.5, and K1 = 0.01, K2 = 0.03 for a range of 255; the variances
    are those of the window, not divided by one less. The map is averaged over all places whose window lies within the
    picture, and over the channels. Pictures are taken one after another, so memory does not grow with their number.

    Arguments:
        images_a, images_b: uint8 (B, H, W, C) of one shape, H and W 11 at least.

    Returns:
        Estimate: mean over pictures +- 1.96 standard errors, with an infinite interval for a single pair.

    Raises:
        ValueError: dtypes or shapes that do not fit, no picture, or pictures smaller than the window.
    """
    _check_pairs("ssim", images_a, images_b)
    if min(images_a.shape[1:3]) < len(_SSIM_WINDOW):
        raise ValueError(f"ssim: received pictures of shape {images_a.shape}, expected 11x11 pixels at least")
    similarities = [_similarity(a, b) for a, b in zip(images_a, images_b, strict=True)]
    return mean_estimate(np.array(similarities))


def _similarity(a, b):
    """The structural similarity of two pictures uint8 (H, W, C), eq. 13 of Wang et al. 2004."""
    a, b = a.astype("float64"), b.astype("float64")
    mean_a, mean_b, square_a, square_b, product = map(_windowed_mean, (a, b, a * a, b * b, a * b))
    variances = square_a - mean_a**2 + square_b - mean_b**2
    covariance = product - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variances + c2)  # contrast's and structure's terms in one
    return (luminance * structure).mean()


def _windowed_mean(values):
    """(H, W, C) -> (H - 10, W - 10, C), means by the Gaussian window, rows and then columns."""
    for _ in ("rows", "columns"):
        places = len(values) - len(_SSIM_WINDOW) + 1
        shifted = (values[start : start + places] for start in range(len(_SSIM_WINDOW)))
        means = sum(share * part for share, part in zip(_SSIM_WINDOW, shifted, strict=True))
        values = means.swapaxes(0, 1)
    return values


def _check_pairs(name, images_a, images_b):
    if not (
        images_a.dtype == images_b.dtype == np.uint8 and images_a.shape == images_b.shape and len(images_a)
    ):
        received = f"{images_a.dtype} {images_a.shape} and {images_b.dtype} {images_b.shape}"
        raise ValueError(
            f"{name}: received {received}, expected equal shapes of uint8 and a picture at least"
        )


def mean_estimate(values):
    """The mean of values (N,) of N pictures as an `Estimate`, +- 1.96 standard errors."""
    mean = float(values.mean())
    if not np.isfinite(mean):
        return Estimate(mean, mean, mean)
    if len(values) == 1:
        return Estimate(mean, float("-inf"), float("inf"))
    error = float(values.std(ddof=1) / np.sqrt(len(values)))
    return Estimate(mean, mean - _NORMAL_97_5 * error, mean + _NORMAL_97_5 * error)
