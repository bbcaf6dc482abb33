"""A request draws with the weights that it asks for, and says which they were."""

import shutil

import numpy as np
import pytest
from PIL import Image

from checkpoint import RunFolder
from config import to_dict
from generate import Painter, load, requests, write_pictures
from tests.drawings import DRAWN_CONFIG, GUIDANCE, PROMPTS, STEPS, diffusion_tensors, drawn


def test_the_newest_weights_draw_where_they_are_asked_for(run_path, networks, tmp_path, capsys):
    settings = {"steps": STEPS, "guidance": GUIDANCE, "sampler": "ddim", "spacing": "uniform"}
    unet, text_encoder = (type(own).from_config(own.get_config()) for own in networks[2:0:-1])
    for halved, own in ((unet, networks.unet), (text_encoder, networks.text_encoder)):
        halved.set_weights([0.5 * value for value in own.get_weights()])
    newest = Painter(networks._replace(unet=unet, text_encoder=text_encoder), 16)
    (path,) = write_pictures(run_path, PROMPTS[:1], newest=True, **settings, out=tmp_path / "newest")
    (expected,) = drawn(newest, PROMPTS[:1], **settings, interval=DRAWN_CONFIG.evaluation.guidance_interval)
    with Image.open(path) as file:
        np.testing.assert_allclose(np.asarray(file).astype(int), expected.image, atol=1)
        assert file.text["weights"] == "newest of step 6"
    told = "by the weights: newest of step 6; the training is not finished, and its command goes on"
    assert capsys.readouterr().out.splitlines()[1] == told


OTHERS = "; the newest, of step 6, draw with --newest"


@pytest.mark.parametrize(
    ("best", "average", "newest", "told"),
    [
        (3, False, False, f"best of step 3{OTHERS}"),
        (3, False, True, "newest of step 6"),
        (6, False, False, "best of step 6"),
        (3, True, False, f"average of length 0.05 of step 6{OTHERS}"),
        (3, True, True, "newest of step 6"),
    ],
)
@pytest.mark.parametrize("is_finished", [False, True])
def test_which_weights_drew_is_told(
    run_path, networks, tmp_path, capsys, best, average, newest, told, is_finished
):
    shutil.copytree(run_path, tmp_path / "run")
    with RunFolder.open(tmp_path / "run", to_dict(DRAWN_CONFIG)) as run:
        if best == 6:
            run.save_best("diffusion", 0.01, 0.0, 0.02, diffusion_tensors(networks), {"step": 6})
        if average:
            run.finish("diffusion", diffusion_tensors(networks), {"step": 6, "length": 0.05})
        if is_finished:
            run.curves_path.touch()
    loaded = load(run.path, newest)[0].weights
    end = "" if is_finished else "; the training is not finished, and its command goes on"
    assert f"{loaded}" == told.partition(";")[0]
    assert requests._other_weights(run, loaded) == told.removeprefix(f"{loaded}") + end
