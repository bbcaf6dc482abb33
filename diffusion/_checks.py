"""What every door of the process refuses, each with one line that says what was received."""

import numbers

import numpy as np


def one_of(name, value, known):
    """Refuses a `value` that is not among the `known` names."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}. Received: {value!r}")


def within(name, value, least, most):
    """Refuses numbers outside [least, most], and NaN; a tensor within a graph has no value yet and passes."""
    if isinstance(value, (numbers.Real, list, tuple, np.ndarray)) or hasattr(value, "numpy"):
        values = np.ravel(np.asarray(value))
        wrong = values[~((values >= least) & (values <= most))]
        if wrong.size:
            raise ValueError(f"{name} must be within [{least:g}, {most:g}]. Received: {wrong[0]:g}")
