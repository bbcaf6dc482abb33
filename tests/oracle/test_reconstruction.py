"""PSNR and SSIM against scikit-image."""

import numpy as np
import pytest

skimage = pytest.importorskip("skimage.metrics")

from metrics import psnr, ssim  # noqa: E402

WANG = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": -1}


@pytest.fixture(params=["smooth", "noise", "smallest"])
def pairs(request):
    """Three pictures and what distortion leaves of them, from little to much."""
    rng = np.random.default_rng(0)
    height, width = (11, 11) if request.param == "smallest" else (48, 37)
    if request.param == "smooth":
        y, x = np.mgrid[:height, :width][..., None] / 9
        phases = rng.uniform(0, 6, (3, 1, 1, 3))
        one = (127 + 120 * np.sin(x + phases) * np.cos(y - phases)).astype(np.uint8)
    else:
        one = rng.integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    noise = np.array([3, 20, 70])[:, None, None, None] * rng.normal(size=one.shape)
    return one, np.clip(one + noise, 0, 255).astype(np.uint8)


def test_psnr_is_scikit_images(pairs):
    theirs = [skimage.peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(*pairs)]
    for index, value in enumerate(theirs):
        one, other = (side[index : index + 1] for side in pairs)
        assert psnr(one, other).value == pytest.approx(value, abs=1e-6)
    assert psnr(*pairs).value == pytest.approx(np.mean(theirs), abs=1e-6)


def test_ssim_is_scikit_images(pairs):
    theirs = [skimage.structural_similarity(a, b, data_range=255, **WANG) for a, b in zip(*pairs)]
    assert max(theirs) - min(theirs) > 0.1
    for index, value in enumerate(theirs):
        one, other = (side[index : index + 1] for side in pairs)
        assert ssim(one, other).value == pytest.approx(value, abs=1e-6)
    assert ssim(*pairs).value == pytest.approx(np.mean(theirs), abs=1e-6)
