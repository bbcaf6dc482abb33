"""The order of the work: data, autoencoder, latents, diffusion, pictures.

Every stage asks the run folder what is done already and goes on from there, so that the same command, given
again, resumes. The room that sees the whole config, of which the others get their parts.
"""

import contextlib
import shlex
import time
from pathlib import Path

import config as settings
from callbacks import Interrupted, Signals
from checkpoint import RunFolder, assign, named_variables
from evaluate import follows_captions, plot_curves
from generate import lead_away
from model.perceptual import FeatureNetwork
from stages.appraisal import save_plot
from stages.autoencoder import trained_autoencoder
from stages.data import prepared_data
from stages.devices import devices_in_words, strategy_on
from stages.fitting import steps_an_epoch
from stages.latent_diffusion import latents_of, text_encoder_from, trained_diffusion

PROBED_CAPTIONS = 256
FEW_STEPS = 200  # of the U-Net: the flowers of the default run are ragged until then
PROBED_ATTRIBUTES = ("petal_color", "center_color", "petals")


class Stopped(Exception):
    """A signal stopped the run; it is saved. `signal` is the signal's number."""

    def __init__(self, run, number):
        super().__init__(f"Stopped; {run} is saved. Give the same command again to go on.")
        self.signal = number


def train(config: settings.Config) -> Path:
    """Trains a text-to-image model end to end, or goes on where the run folder stands.

    Args:
        config: all settings.

    Returns:
        The run's folder.

    Raises:
        InputError: settings, data or run folder that cannot be used.
        Stopped: a signal came; everything is saved.
    """
    settings.check(config)
    return _in_run(config, _train, _say_where)


def _in_run(config, work, say_where):
    """Does a work in the run's folder, on the chosen devices, if it is not done yet, and says where things are.

    Args:
        config: all settings.
        work: function of (config, run, data, strategy, signals).
        say_where: function of (run, data).
    """
    flags = {"--vae-training.batch-size": config.vae_training, "--batch-size": config.training}
    batches = {flag: (stage.batch_size, stage.micro_batches) for flag, stage in flags.items()}
    strategy = strategy_on(config.gpus, batches)
    print(f"\ntraining on {devices_in_words()}", flush=True)
    with RunFolder.open(config.run, settings.to_dict(config)) as run, Signals() as signals:
        try:
            with _stage("data"):
                data = prepared_data(config, run)
            if run.is_finished:
                print("\nThis run is finished; there is nothing left to do.")
            else:
                work(config, run, data, strategy, signals)
            say_where(run, data)
        except Interrupted as stop:
            raise Stopped(config.run, stop.signal) from stop
    return run.path


def train_vae(config: settings.Config) -> Path:
    """Trains an autoencoder alone, or goes on where the run folder stands.

    Args, returns and raises as `train`. Another run takes the autoencoder by `vae_from`.
    """
    settings.check(config, autoencoder_alone=True)
    return _in_run(config, _train_vae_alone, _say_where_the_vae_is)


def _train_vae_alone(config, run, data, strategy, signals):
    judge = config.evaluation
    features = FeatureNetwork(judge.network, judge.size, judge.weights)
    with _stage("autoencoder"):
        trained_autoencoder(config, run, data, features, strategy, signals)
    save_plot(plot_curves, run.curves_path, run.rows())


def _say_where_the_vae_is(run, data):
    print(f"   reconstructions  {run.path / 'samples'}")
    print(f"   curves           {run.vae_curves_path}")
    print(f"   latents          {run.latents_path}")
    if not run.config["vae"]["skips"]:
        flags = settings.flags_for_its_autoencoder(run.config)
        print(
            "\nTrain a diffusion model on it:\n"
            f"   python cup3.py --vae-from {shlex.quote(str(run.path))} --run {shlex.quote(f'{run.path}-diffusion')} "
            f"--data {shlex.quote(run.config['data'])} {flags}\nWithout captions add --conditioning none."
        )


def _train(config, run, data, strategy, signals):
    judge = config.evaluation
    if not any(run.checkpoint_steps(stage) for stage in ("vae", "diffusion")):
        # Later it is too late for other settings.
        _note_few_steps(config.training, len(data.train_ids))
    # First of all, so that what cannot be had is refused before anything is trained.
    features = FeatureNetwork(judge.network, judge.size, judge.weights)
    text = text_encoder_from(config, data.vocabulary) if config.text_from else None
    with _stage("autoencoder"):
        vae = trained_autoencoder(config, run, data, features, strategy, signals)
    with _stage("latents"):
        latents = latents_of(config, run, data, vae)
    with _stage("diffusion"):
        trainer = trained_diffusion(config, run, data, vae, latents, features, text, strategy, signals)
    with _stage("pictures"):
        _pictures(config, run, data, trainer)


def _note_few_steps(stage, pictures):
    """Says beforehand that a training will be too short to show anything, as the defaults make it on few pictures."""
    steps = stage.epochs * steps_an_epoch(stage, pictures)
    if steps < FEW_STEPS:
        print(
            f"   note: {steps} step{'s' * (steps != 1)} of the U-Net in all are too few for more than blots; for more, "
            "begin another run (--run) with more --epochs, or --training.steps-per-epoch 100 or more"
        )


@contextlib.contextmanager
def _stage(name):
    """Prints a heading, and how long the stage took."""
    print(f"\n== {name}", flush=True)
    started = time.monotonic()
    yield
    print(f"   {name}: {time.monotonic() - started:.1f} s", flush=True)


# The end.


def _pictures(config, run, data, trainer):
    best = run.best("diffusion")
    if best:  # the best averaged networks take the place of the last ones; the compiled painter stays
        for name in ("ema_unet", "ema_text_encoder"):
            assign(named_variables(trainer.networks[name]), best.tensors, name, source=run.path)
    step = best.step if best else int(trainer.optimizer.iterations)
    lead_away(trainer.painter, run, config.evaluation, step)
    if data.has_probe:
        captions = data.vocabulary.decode(data.shown_tokens[:PROBED_CAPTIONS])
        _report_probe(run, follows_captions(trainer.painter, captions, **trainer.draw_settings))
    save_plot(plot_curves, run.curves_path, run.rows())


def _report_probe(run, right):
    run.truncate_log("probe", -1)
    run.log({"stage": "probe", "step": 0, **right})
    shares = ", ".join(f"{name.replace('_', ' ')} {right[name]:.1%}" for name in PROBED_ATTRIBUTES)
    captions = f"{right['n']} test caption{'s' * (right['n'] != 1)}"
    print(f"   of {captions} the pictures follow: {shares}")


def _say_where(run, data):
    best = run.best_state("diffusion")
    (text,) = data.vocabulary.decode(data.shown_tokens[:1])
    what = f'--prompt "{text}"' if text else "--count 4"
    print(f"   pictures         {run.path / 'samples'}")
    print(f"   curves           {run.curves_path}")
    if best:
        interval = f"[{best['low']:.4f}, {best['high']:.4f}]"
        print(
            f"   best checkpoint  {run.path / 'best'}, of epoch {best['epoch']}, KID {best['value']:.4f} {interval}"
        )
        if _is_no_worse(run, best):
            what += " --newest"
            print(
                f"   note: KID cannot tell the last epoch from it with {len(data.validation_ids)} pictures held out; "
                "--newest draws with the last"
            )
    print(f"\nDraw a picture:\n   python cup3.py generate --run {run.path} {what}")


def _is_no_worse(run, best):
    """Whether the last epoch that was measured is not the best, but has no surely higher KID: it has trained longer."""
    last = [row for row in run.rows() if row.get("val_kid") is not None][-1]
    return last["step"] > best["step"] and last.get("val_kid_change_low", 0) < 0
