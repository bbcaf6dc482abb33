"""The report of latents has the numbers of the posteriors' mixture, and its figure shows them."""

import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from evaluate import latent_report, plot_latents
from evaluate.latents import DEAD_COLOUR, LIVE_COLOUR
from model.vae import kl_divergence


def moments(channels=3, n=40, seed=0):
    """Posteriors of which no channel is like another."""
    rng = np.random.default_rng(seed)
    scales = 1.0 + np.arange(channels)
    mean = scales * rng.gamma(2.0, size=(n, 4, 4, channels)) - 1.0
    logvar = rng.normal(-1.0, 0.7, size=mean.shape) + 0.3 * np.arange(channels)
    return mean.astype("float32"), logvar.astype("float32")


def report_of(mean, logvar, shift=0.0, scale=1.0, image_size=8):
    ones = np.ones(mean.shape[-1])
    return latent_report(mean, logvar, shift * ones, scale * ones, image_size)


def test_moments_are_those_of_drawn_samples():
    mean, logvar = moments(n=400)
    report = latent_report(mean, logvar, np.array([0.5, 1.0, -2.0]), np.array([1.5, 2.0, 3.0]), 8)
    rng, draws = np.random.default_rng(1), 300
    for k, channel in enumerate(report["channels"]):
        std = np.exp(0.5 * logvar[..., k].astype("float64"))
        z = mean[..., k] + std * rng.normal(size=(draws, *std.shape))
        unit = (z - channel["mean"]) / channel["std"]
        assert abs(unit.mean()) < 0.005 and unit.std() == pytest.approx(1, abs=0.005)
        assert channel["skewness"] == pytest.approx((unit**3).mean(), abs=0.03)
        assert channel["kurtosis"] == pytest.approx((unit**4).mean() - 3, abs=0.1)
        assert channel["kurtosis"] > 0.3  # so that the 3 shows
        assert channel["signal"] == pytest.approx(mean[..., k].var() / z.var(), rel=0.01)
        shift, scale = ((0.5, 1.5), (1.0, 2.0), (-2.0, 3.0))[k]
        assert channel["unit_mean"] == pytest.approx(((z - shift) / scale).mean(), abs=0.005)
        assert channel["unit_std"] == pytest.approx(((z - shift) / scale).std(), rel=0.005)


def test_moments_of_two_equally_likely_posteriors():
    # z = +-a + s e: variance a^2 + s^2, no skewness, fourth moment a^4 + 6 a^2 s^2 + 3 s^4.
    a, s = 2.0, 0.5
    mean = np.tile([a, -a], 8).reshape(4, 2, 2, 1)
    (channel,) = report_of(mean, np.full(mean.shape, 2 * math.log(s)))["channels"]
    assert channel["std"] == pytest.approx(math.sqrt(a**2 + s**2))
    assert channel["signal"] == pytest.approx(a**2 / (a**2 + s**2))
    assert channel["skewness"] == pytest.approx(0)
    fourth = a**4 + 6 * a**2 * s**2 + 3 * s**4
    assert channel["kurtosis"] == pytest.approx(fourth / (a**2 + s**2) ** 2 - 3)
    assert channel["kl"] == pytest.approx(0.5 * (a**2 + s**2 - 1 - 2 * math.log(s)))


def test_the_total_is_the_divergence_that_the_training_knows():
    mean, logvar = moments()
    report = report_of(mean, logvar, image_size=8)
    nats = float(np.mean(np.sum(kl_divergence(mean, logvar), axis=(1, 2, 3))))
    assert report["kl_nats_a_picture"] == pytest.approx(nats, rel=1e-5)
    assert report["kl_bits_a_pixel"] == pytest.approx(nats / math.log(2) / 64, rel=1e-5)
    assert report["pictures"] == 40


def collapsed():
    """Three channels: one whose posterior is nearly the prior (KL 0.005), one just alive (0.02), one that speaks."""
    kls = [0.005, 0.02, 2.0]
    mean = np.broadcast_to(np.sqrt(2 * np.array(kls)), (2, 2, 2, 3))
    return mean, np.zeros_like(mean)


def test_dead_channels_are_those_below_a_hundredth_of_a_nat():
    report = report_of(*collapsed())
    np.testing.assert_allclose([channel["kl"] for channel in report["channels"]], [0.005, 0.02, 2.0])
    assert [channel["dead"] for channel in report["channels"]] == [True, False, False]
    assert report["dead_channels"] == 1


def test_histograms_are_of_samples_at_unit_scale():
    shape = (50, 20, 20, 2)
    mean, logvar = np.full(shape, [3.0, -1.0]), np.full(shape, [math.log(4.0), 0.0])
    report = latent_report(mean, logvar, np.array([3.0, -1.0]), np.array([2.0, 0.1]), 40)
    edges = np.array(report["edges"])
    normal = [0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in edges]
    masses = np.array([channel["density"] for channel in report["channels"]]) * np.diff(edges)
    np.testing.assert_allclose(masses[0], np.diff(normal), atol=0.008)
    # The second is ten times too wide: what lies beyond 5 deviations is told, not folded in.
    assert report["channels"][1]["beyond"] == pytest.approx(2 * (1 - 0.691462), abs=0.02)
    for channel, mass in zip(report["channels"], masses, strict=True):
        assert mass.sum() + channel["beyond"] == pytest.approx(1)


def test_the_report_is_the_same_again_and_json_keeps_it():
    report = report_of(*moments())
    assert report == report_of(*moments())
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("channels", [1, 3, 32])
def test_the_figure_shows_the_report(channels, monkeypatch, tmp_path):
    mean, logvar = moments(channels)
    mean[..., 0], logvar[..., 0] = 0.0, 0.0
    report, closed = report_of(mean, logvar), []
    monkeypatch.setattr(plt, "close", closed.append)
    plot_latents(json.loads(json.dumps(report)), tmp_path / "latents.png")
    bars, *histograms = closed[0].axes
    heights = [bar.get_height() for bar in bars.patches]
    np.testing.assert_allclose(heights, [channel["kl"] for channel in report["channels"]])
    assert [text.get_text() for text in bars.texts] == ["dead"] + [""] * (channels - 1)
    assert f"1 of {channels} channels dead" in bars.get_title()
    assert len(histograms) == channels
    for k, (axis, channel) in enumerate(zip(histograms, report["channels"], strict=True)):
        (steps,), (curve,) = axis.patches, axis.get_lines()
        np.testing.assert_allclose(steps.get_data().values, channel["density"])
        assert plt.matplotlib.colors.same_color(
            steps.get_facecolor()[:3], DEAD_COLOUR if k == 0 else LIVE_COLOUR
        )
        x, y = curve.get_data()
        assert y.max() == pytest.approx(1 / math.sqrt(2 * math.pi)) and x[y.argmax()] == pytest.approx(0)
    monkeypatch.undo()
    plt.close(closed[0])
    with Image.open(tmp_path / "latents.png") as picture:
        assert picture.format == "PNG"


def test_a_report_of_a_broken_autoencoder_is_drawn(tmp_path):
    mean, logvar = moments()
    mean[..., 1] = np.nan
    report = report_of(mean, logvar)
    assert not report["channels"][1]["dead"] and math.isnan(report["channels"][1]["kl"])
    kept = {**report, "kl_nats_a_picture": None, "kl_bits_a_pixel": None}  # as JSON keeps them
    kept["channels"][1] = {**kept["channels"][1], "kl": None}
    plot_latents(kept, tmp_path / "latents.png")
    assert (tmp_path / "latents.png").stat().st_size > 0


def test_shapes_that_do_not_fit_are_refused():
    mean, logvar = moments()
    with pytest.raises(ValueError, match=r"received mean \(40, 4, 4, 3\), logvar \(40, 4, 4, 2\)"):
        latent_report(mean, logvar[..., :2], np.zeros(3), np.ones(3), 8)
    with pytest.raises(ValueError, match=r"latent_std \(2,\)"):
        latent_report(mean, logvar, np.zeros(3), np.ones(2), 8)
