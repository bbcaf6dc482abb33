"""Averages of weights over a training: power functions of the step, and from a few of them any other length.

Post-hoc EMA of Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", section 3 and
appendix C. A power average of exponent g weighs the weights of step s, among those of steps up to t, by s^g: so it
forgets the beginning however long the training is, and its *length*, the standard deviation of that profile as a share
of t, stays the same. Snapshots of two lengths, kept now and then, span profiles; a profile of another length is fitted
by them in least squares.
"""

import numpy as np

LENGTHS = (0.05, 0.10)  # of the averages that a training keeps; sigma_rel in the paper
# Steps between two updates of these: a sample of the weights tells as much, for a quarter of the time.
EVERY = 4
SHORTEST, LONGEST = 0.01, 0.28  # lengths that can be rebuilt; an even average of all steps has 0.289


def exponent(length):
    """The exponent g of a power average of a length: length = (g + 1)^(1/2) (g + 2)^(-1) (g + 3)^(-1/2).

    Raises:
        ValueError: no such average, as the length is not within `SHORTEST` and `LONGEST`.
    """
    if not SHORTEST <= length <= LONGEST:
        raise ValueError(f"length must be within {SHORTEST} and {LONGEST}. Received: {length}")
    inverse = length**-2.0
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def share(step, exponent):
    """How much of itself an average gives up to the weights of `step`, `EVERY` steps after its last update."""
    return 1.0 - (1.0 - EVERY / step) ** (exponent + 1.0)


def snapshot_steps(steps, count):
    """At which steps of a training, at most `count` and evenly spread, its averages are to be kept."""
    marks = {steps * (number + 1) // count // EVERY * EVERY for number in range(count)}
    return sorted(marks - {0})


def mixture(steps, lengths, step, length):
    """How much each snapshot counts, (N,), for the average of `length` at `step`; negative for some, 1 in all.

    In the paper weights are normalised where they are used, so that their sizes do not matter; here they do, hence the
    sum of 1.

    Args:
        steps, lengths: of the snapshots, N each.
        step, length: of the average to build.
    """
    steps, exponents = np.asarray(steps, "float64"), np.array([exponent(one) for one in lengths])
    step, wanted = np.array([step], "float64"), np.array([exponent(length)])
    # Normal equations in units of their diagonal's size, and below them Lagrange's row for the sum.
    known, target = _products(steps, exponents, steps, exponents), _products(steps, exponents, step, wanted)
    size = np.diag(known).mean()
    ones = np.ones((len(steps), 1))
    equations = np.block([[known / size, ones], [ones.T, np.zeros((1, 1))]])
    # Profiles that lie close together make them nearly singular: least squares takes the smallest answer.
    return np.linalg.lstsq(equations, np.append(target / size, 1.0), rcond=1e-12)[0][:-1]


def _products(steps, exponents, other_steps, other_exponents):
    """The inner products (N, M) of the profiles p(s) = (g + 1) s^g / t^(g + 1), s <= t, with others.

    With u the earlier of the two ends t and t', it is (g + 1) (g' + 1) / (g + g' + 1) u^(g + g' + 1) / (t^(g + 1)
    t'^(g' + 1)); in logarithms, as these powers are out of range.
    """
    t, g = steps[:, None], exponents[:, None]
    other_t, other_g = other_steps[None], other_exponents[None]
    total = g + other_g + 1.0
    logarithm = (
        total * np.log(np.minimum(t, other_t)) - (g + 1.0) * np.log(t) - (other_g + 1.0) * np.log(other_t)
    )
    return (g + 1.0) * (other_g + 1.0) / total * np.exp(logarithm)
