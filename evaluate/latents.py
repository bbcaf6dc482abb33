"""What an autoencoder's latents are like, channel by channel: their KL, their scale, their shape."""

import math

import matplotlib.pyplot as plt
import numpy as np

from evaluate._figures import save

DEAD_BELOW = 0.01  # nats a latent value: a channel of less KL says next to nothing of the picture
EDGES = np.linspace(-5.0, 5.0, 61)  # of the histograms' bins, in units of the standard deviation
COLUMNS = 8  # histograms a row
LIVE_COLOUR, DEAD_COLOUR = "tab:blue", "tab:red"


def latent_scale(mean, logvar):
    """The mean and the standard deviation (C,) of the mixture of posteriors N(mean, exp(logvar)), (N, h, w, C) each.

    In float64: sums of many million values would lose digits in float32.
    """
    everywhere = {"axis": (0, 1, 2), "dtype": "float64"}
    variance = np.var(mean, **everywhere) + np.mean(np.exp(logvar), **everywhere)
    return np.mean(mean, **everywhere), np.sqrt(variance)


def latent_report(mean, logvar, latent_mean, latent_std, image_size, seed=0):
    """What the posteriors N(mean, exp(logvar)) of some pictures say about the latents, for JSON.

    Means, deviations, skewness and kurtosis are those of the mixture of all posteriors, exactly; only the histograms
    are of drawn samples, one a latent value. A channel whose posterior is the prior N(0, 1) whatever the picture has KL
    0: it is dead, or collapsed (Bowman et al. 2016).

    Args:
        mean, logvar: (N, h, w, C), of the raw latents, such as `AutoencoderKL.raw_moments` gives.
        latent_mean, latent_std: (C,), which bring raw latents to unit scale.
        image_size: side in pixels of the square pictures that they were made of.
        seed: of the samples for the histograms.

    Returns:
        dict: `pictures`, how many; `kl_nats_a_picture` and `kl_bits_a_pixel`; `dead_channels`, how many, and
        `dead_below`, in nats a latent value; `edges` of the histograms' bins; `channels`, a dict each: `mean` and
        `std` of the raw latents, `kl` in nats a latent value, `signal`, the share of the variance that the posteriors'
        means have, `dead`, and of the unit-scale latents `unit_mean`, `unit_std`, `skewness`, `kurtosis` (in excess:
        a normal distribution has 0), `density` by bin and `beyond`, the share outside all bins.

    Raises:
        ValueError: shapes that do not fit.
    """
    scales = np.shape(latent_mean), np.shape(latent_std)
    if np.ndim(mean) != 4 or np.shape(mean) != np.shape(logvar) or {*scales} != {np.shape(mean)[-1:]}:
        raise ValueError(
            f"latent_report: received mean {np.shape(mean)}, logvar {np.shape(logvar)}, latent_mean {scales[0]} and "
            f"latent_std {scales[1]}, expected (N, h, w, C) twice and (C,) twice"
        )
    rng = np.random.default_rng(seed)
    raw, unit = np.stack(latent_scale(mean, logvar), -1), np.stack([latent_mean, latent_std], -1)
    channels = [
        {"channel": k, **_channel(mean[..., k], logvar[..., k], raw[k], unit[k], rng)}
        for k in range(len(raw))
    ]
    nats = math.prod(np.shape(mean)[1:3]) * sum(channel["kl"] for channel in channels)
    return {
        "pictures": len(mean),
        "kl_nats_a_picture": nats,
        "kl_bits_a_pixel": nats / math.log(2) / image_size**2,
        "dead_channels": sum(channel["dead"] for channel in channels),
        "dead_below": DEAD_BELOW,
        "edges": EDGES.tolist(),
        "channels": channels,
    }


def _channel(mean, logvar, raw, unit, rng):
    """One channel of the report; mean and logvar (N, h, w).

    Args:
        raw: mean and deviation of the raw latents, see `latent_scale`.
        unit: those that bring them to unit scale.
    """
    mean, logvar = np.asarray(mean, "float64"), np.asarray(logvar, "float64")
    variance = np.exp(logvar)
    kl = 0.5 * np.mean(mean**2 + variance - 1.0 - logvar)

    # The mixture's central moments, by those of each Gaussian around the mixture's mean m: d = mean - m,
    # E (z - m)^2 = d^2 + v, E (z - m)^3 = d^3 + 3 d v, E (z - m)^4 = d^4 + 6 d^2 v + 3 v^2.
    (m, deviation), (shift, scale) = raw, unit
    d, second = mean - m, deviation**2
    third = np.mean(d**3 + 3.0 * d * variance)
    fourth = np.mean(d**4 + 6.0 * d**2 * variance + 3.0 * variance**2)

    samples = (mean + np.sqrt(variance) * rng.standard_normal(mean.shape) - shift) / scale
    counts = np.histogram(samples, EDGES)[0]
    numbers = {
        "mean": m,
        "std": deviation,
        "kl": kl,
        "signal": np.mean(d**2) / second,
        "unit_mean": (m - shift) / scale,
        "unit_std": deviation / scale,
        "skewness": third / second**1.5,
        "kurtosis": fourth / second**2 - 3.0,
        "beyond": 1.0 - counts.sum() / samples.size,
    }
    density = counts / samples.size / np.diff(EDGES)
    return {name: float(number) for name, number in numbers.items()} | {
        "dead": bool(kl < DEAD_BELOW),
        "density": density.tolist(),
    }


def plot_latents(report, path):
    """Draws the KL of each channel, and the histogram of its unit-scale latents over the standard normal density.

    Args:
        report: what `latent_report` returns, or what JSON has kept of it.
        path: PNG file to write: its place, or the file itself, open for bytes.
    """
    channels = report["channels"]
    columns = min(COLUMNS, len(channels))
    lines = -(-len(channels) // columns)
    figure = plt.figure(figsize=(max(6.0, 1.9 * columns), 3.0 + 1.6 * lines))
    grid = figure.add_gridspec(1 + lines, columns, height_ratios=[1.7, *[1.0] * lines])
    _plot_kl(figure.add_subplot(grid[0, :]), report)
    for k, channel in enumerate(channels):
        axis = figure.add_subplot(grid[1 + k // columns, k % columns])
        _plot_histogram(axis, channel, np.asarray(report["edges"]))
    save(figure, path)


def _plot_kl(axis, report):
    channels = report["channels"]
    places = [channel["channel"] for channel in channels]
    values = np.array([channel["kl"] for channel in channels], "float64")  # null is NaN
    bars = axis.bar(places, values, color=[_colour(channel) for channel in channels])
    axis.bar_label(
        bars, ["dead" if channel["dead"] else "" for channel in channels], fontsize="small", color=DEAD_COLOUR
    )
    axis.set_xticks(places)
    axis.set(xlabel="channel", ylabel="KL, nats a latent value", title=_in_words(report))
    axis.margins(x=0.01, y=0.12)


def _in_words(report):
    nats, bits = (np.float64(report[name]) for name in ("kl_nats_a_picture", "kl_bits_a_pixel"))
    return (
        f"KL {nats:.4g} nats a picture, {bits:.3g} bits a pixel; "
        f"{report['dead_channels']} of {len(report['channels'])} channels dead (below {report['dead_below']:g} nats)"
    )


def _plot_histogram(axis, channel, edges):
    z = np.linspace(edges[0], edges[-1], 201)
    axis.stairs(channel["density"], edges, fill=True, color=_colour(channel), alpha=0.6)
    axis.plot(z, np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi), color="black", linewidth=0.8)
    axis.set_title(f"channel {channel['channel']}{', dead' * channel['dead']}", fontsize="small")
    axis.set_yticks([])
    axis.tick_params(labelsize="x-small")


def _colour(channel):
    return DEAD_COLOUR if channel["dead"] else LIVE_COLOUR
