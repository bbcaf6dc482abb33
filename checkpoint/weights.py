"""The only room that knows file names in a run folder: weights of networks to arrays by name, and back."""

import numpy as np

from checkpoint._differences import refuse_differences


def named_variables(network) -> list:
    """(name, variable) of every weight of a network, as `collect` and `assign` take them; names are Keras paths."""
    return [(variable.path, variable) for variable in network.weights]


def collect(variables, prefix: str) -> dict[str, np.ndarray]:
    """Copies variables into arrays named `<prefix>/<name>`.

    Args:
        variables: list of (name, Keras variable); names are unique and the same in every process.
        prefix: tells apart several sets of variables in one checkpoint, such as "raw" and "ema".

    Raises:
        ValueError: two variables have one name.
    """
    return {name: np.asarray(variable).copy() for name, variable in _named(variables, prefix).items()}


def assign(variables, tensors: dict[str, np.ndarray], prefix: str, source="the checkpoint") -> None:
    """Sets variables to the arrays that `collect` made of them; all of them or, on an error, none.

    Args:
        variables: list of (name, Keras variable).
        tensors: arrays by name; those under other prefixes are ignored.
        prefix: as given to `collect`.
        source: what the error message calls the tensors' origin, best a path.

    Raises:
        InputError: a tensor is missing, left over, or of another shape.
        ValueError: two variables have one name.
    """
    variables = _named(variables, prefix)
    received = {name: tuple(array.shape) for name, array in tensors.items() if name.startswith(f"{prefix}/")}
    expected = {name: tuple(variable.shape) for name, variable in variables.items()}
    refuse_differences(source, "set of variables", received, expected, at_most=5)
    for name, variable in variables.items():
        variable.assign(tensors[name])


def _named(variables, prefix: str) -> dict:
    named = {f"{prefix}/{name}": variable for name, variable in variables}
    if len(named) < len(variables):
        names = [name for name, _ in variables]
        raise ValueError(
            f"two variables have one name: {sorted({name for name in names if names.count(name) > 1})}"
        )
    return named
