"""The U-Net is trained on the times and the text that the settings say."""

import signal

import numpy as np
import pytest
import tensorflow as tf

import cup3
from callbacks import Interrupted
from checkpoint import RunFolder
from diffusion.schedule import Process
from diffusion.times import TIMES, training_times
from input_pipeline import load_data
from stages import latent_diffusion
from tests.tiny_runs import refusal, words


def test_the_times_are_drawn_as_the_settings_say(finished, flowers, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def latent_batches(*arguments, times, **keywords):
        raise Seen(times)

    monkeypatch.setattr(latent_diffusion.pipeline, "latent_batches", latent_batches)
    shares = np.array([0.1, 0.4, 0.9], "float32")
    for times in TIMES:
        changes = {"vae-from": finished[0], "training.times": times}
        with pytest.raises(Seen) as seen:
            cup3.main(words(flowers, tmp_path / times, **changes))
        np.testing.assert_array_equal(seen.value.args[0](shares), training_times(times, Process())(shares))


def test_the_process_is_that_of_the_settings(finished, flowers, tmp_path, monkeypatch):
    seen = []

    def look(trainer, *_):
        seen.append(trainer)
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(latent_diffusion, "fit", look)
    own = {
        "schedule": "flow",
        "target": "flow",
        "shift": 2.0,
        "weight": "min-snr",
        "snr-cap": 3.0,
        "loss": "huber",
    }
    flags = {f"diffusion.{name}": value for name, value in own.items()}
    with pytest.raises(SystemExit):
        cup3.main(words(flowers, tmp_path / "flow", vae_from=finished[0], **flags))
    grid = {"diffusion.schedule": "sigmoid", "diffusion.weight": "none"}
    line = words(flowers, tmp_path / "grid", vae_from=finished[0], **grid)
    with pytest.raises(SystemExit):
        cup3.main([*line, "--diffusion.zero-terminal-snr"])
    expected = Process(**{name.replace("-", "_"): value for name, value in own.items()})
    assert seen[0].process == seen[0].painter.networks.process == expected
    assert seen[1].process == Process("image", schedule="sigmoid", zero_terminal_snr=True)


def test_text_from_takes_the_text_encoder_of_another_run_as_it_is(finished, flowers, tmp_path, monkeypatch):
    seen = {}

    def look(trainer, keeper, batches_from, validation):
        batch = next(iter(batches_from(3)))
        seen.update(trainer=trainer, batches=[batch, next(iter(validation))])
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(latent_diffusion, "fit", look)
    sources = {"vae_from": finished[0], "text_from": finished[0]}
    with pytest.raises(SystemExit):
        cup3.main(words(flowers, tmp_path / "run", **sources, **{"training.caption_dropout": 0}))
    encoder, best = seen["trainer"].text_encoder, RunFolder.read(finished[0]).best("diffusion").tensors
    for weight in encoder.weights:
        np.testing.assert_array_equal(weight, best[f"ema_text_encoder/{weight.path}"])
    learning = seen["trainer"].unet, seen["trainer"].log_variance
    expected = [variable for network in learning for variable in network.trainable_variables]
    assert seen["trainer"].trained_variables == expected
    data = load_data(flowers)
    for batch in seen["batches"]:
        assert "tokens" not in batch
        for index, context, mask in zip(batch["sample_ids"], batch["context"], batch["mask"], strict=True):
            tokens = data.captions[int(index)]
            masks = data.vocabulary.mask(tokens)
            own = np.asarray(encoder([tf.constant(tokens), tf.constant(masks)]))
            nearest = np.abs(own - context).max((1, 2)).argmin()  # one of its five captions
            np.testing.assert_allclose(own[nearest], context, atol=1e-5)
            np.testing.assert_array_equal(masks[nearest], mask)


def test_a_text_encoder_of_other_words_or_shape_or_none_is_refused(
    finished, flowers, photographs, tmp_path, capsys
):
    changes = {"training.validation_fraction": 0.25}
    other_words = words(photographs, tmp_path / "run", text_from=finished[0], **changes)
    line = f"--text-from: received {finished[0]}, whose words are not those of the data"
    assert refusal(capsys, other_words) == f"{line}; expected a run of the same data"
    with RunFolder.open(tmp_path / "bare", {"seed": 0}):
        pass
    bare = refusal(capsys, words(photographs, tmp_path / "run", text_from=tmp_path / "bare", **changes))
    assert bare == f"--text-from: received {tmp_path / 'bare'}, expected a run with a trained text encoder"
    other_shape = words(flowers, tmp_path / "run", text_from=finished[0], **{"text_encoder.width": 16})
    line = f"--text-from: received {finished[0]}, whose --text-encoder.width is 8, expected 16"
    assert refusal(capsys, other_shape) == f"{line}; give --text-encoder.width 8"
    assert not (tmp_path / "run").exists()
