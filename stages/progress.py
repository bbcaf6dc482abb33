"""The order of the work: what the rows of a log say of a loss that does not fall any more."""


def epochs_without(values):
    """How many epochs ago the least of some values was, the first of them where several are; 0 where it is the last.

    What is None, as JSON keeps NaN, is never the least; where nothing else is, the first epoch counts as if it were.
    """
    known = [(value, epoch) for epoch, value in enumerate(values) if value is not None]
    return len(values) - 1 - min(known)[1] if known else max(0, len(values) - 1)


def rate_scale(values, patience, factor):
    """What "plateau" multiplies the learning rate by after epochs with such values of the loss.

    The rate is multiplied by `factor` each time that `patience` epochs in a row have brought no new least value; then
    it has as many again.

    Args:
        values: of the loss that is watched, an epoch each; None where it was no number.
        patience: epochs.
        factor: below 1.
    """
    scale, best, waited = 1.0, None, 0
    for value in values:
        is_less = value is not None and (best is None or value < best)
        best, waited = (value, 0) if is_less else (best, waited + 1)
        if waited == patience:
            scale, waited = scale * factor, 0
    return scale
