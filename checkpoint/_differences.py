"""The only room that knows file names in a run folder: what was received beside what was expected, key by key."""

from errors import InputError


def refuse_differences(place, what: str, received: dict, expected: dict, at_most: int | None = None) -> None:
    """Raises an InputError that lists the keys whose values differ or that only one side has."""
    received, expected = _flat(received), _flat(expected)
    differences = [
        f"{key} received {received.get(key, 'nothing')}, expected {expected.get(key, 'nothing')}"
        for key in sorted(received.keys() | expected.keys())
        if key not in received or key not in expected or received[key] != expected[key]
    ]
    if differences:
        more = f"; and {len(differences) - at_most} more" if at_most and len(differences) > at_most else ""
        raise InputError(f"{place}: another {what}: {'; '.join(differences[:at_most])}{more}")


def _flat(value, name: str = "") -> dict:
    """{"vae": {"side": 64}} -> {"vae.side": 64}"""
    if not isinstance(value, dict) or (name and not value):
        return {name: value}
    return {
        key: leaf for part in value for key, leaf in _flat(value[part], f"{name}.{part}".lstrip(".")).items()
    }
