"""The order of the work: a trained run's KID, and which average of its weights has the least."""

import config as settings
from checkpoint import RunFolder, assign, is_better, named_variables
from errors import InputError
from evaluate import plot_sweep
from files import atomic_file
from generate import (
    Painter,
    chosen_weights,
    drawing,
    lead_away,
    load,
    rebuilt_average,
    snapshots_of,
    trained_weights,
)
from metrics import KID
from model.perceptual import FeatureNetwork
from stages.data import prepared_data
from stages.devices import strategy_on
from stages.latent_diffusion import protocol_of

SWEPT_LENGTHS = (0.04, 0.05, 0.06, 0.08, 0.10, 0.12, 0.15)


def evaluate(path, ema_sweep=False, gpus="all") -> dict:
    """Measures the KID of a trained run as its training did, and writes it with its protocol as `metrics.json`.

    Args:
        path: the run's folder.
        ema_sweep: whether to measure averages of other lengths first, see `averages`, into `ema_sweep.json`. The best
            of them draws from then on if its KID is lower than that of the weights that training has chosen: by so much
            that the interval of the difference, of pictures from the same noise, is below 0.
        gpus: see `config.Config`.

    Returns:
        What `metrics.json` holds.

    Raises:
        InputError: the run is not trained, not finished or has kept no averages, or its data cannot be used.
    """
    run = RunFolder.read(path)
    if ema_sweep:
        _check_sweep(run)
    settings.check(settings.from_dict(run.config, gpus=gpus))
    strategy_on(gpus, {})  # before TensorFlow makes a variable
    networks, config = load(path)
    with RunFolder.open(path, settings.to_dict(config)) as run:
        data = prepared_data(config, run)
        measure = _Measurement(config, run, networks, data)
        protocol = protocol_of(config, measure.kid, len(data.validation_ids), len(measure.tokens))
        if ema_sweep:
            swept = _swept(run, measure)
            run.write_json("ema_sweep.json", swept | {"protocol": protocol})
        saved = chosen_weights(run)
        value = measure(saved.tensors, saved.step)
        _say("KID", value)
        weights = {"step": saved.step, "length": saved.state.get("length"), "weak_step": measure.weak_step}
        floor = measure.kid.floor().value
        result = {"kid": value._asdict(), "floor": floor, "weights": weights, "protocol": protocol}
        run.write_json("metrics.json", result)
    return result


def _check_sweep(run):
    snapshots_of(run)
    if not run.is_finished:
        raise InputError(
            f"{run.path}: received a run that is still to be trained, expected a finished one for --ema-sweep: "
            "give its training command again, which goes on"
        )


class _Measurement:
    """KID of a run's networks with any weights.

    Attributes:
        weak_step: of the average that the last ones were led away from, see `lead_away`.
    """

    def __init__(self, config, run, networks, data):
        self.run, self.judge, self.weak_step = run, config.evaluation, None
        judge = config.evaluation
        self.painter = Painter(networks, config.image_size, judge.batch_size)
        self.kid = KID(FeatureNetwork(judge.network, judge.size, judge.weights))
        held_out = data.whole(data.validation_ids, config.image_size)
        self.kid.set_real(self.kid.feature_network(held_out, progress=True))
        self.tokens, self.drawing = data.validation_tokens[: judge.images], drawing(config)

    def __call__(self, tensors, step):
        for name in ("unet", "text_encoder"):
            variables = named_variables(getattr(self.painter.networks, name))
            assign(variables, tensors, f"ema_{name}", source=self.run.path)
        self.weak_step = lead_away(self.painter, self.run, self.judge, step)
        return self.painter.measure(self.kid, self.tokens, **self.drawing)


def _swept(run, measure):
    """KID of every length; the best takes the place of the weights that draw if it is better than training's."""
    saved, last = trained_weights(run), snapshots_of(run)[-1]
    trained = measure(saved.tensors, saved.step)
    features, rows = measure.kid.features(), []
    _say("chosen in training", trained)
    for length in SWEPT_LENGTHS:
        value = measure(saved.tensors | rebuilt_average(run, length), last)
        difference = measure.kid.less(features)
        _say(f"length {length:.2f}", value)
        rows.append({"length": length, "kid": value._asdict(), "difference": difference._asdict()})
    with atomic_file(run.sweep_path) as file:
        plot_sweep(rows, trained.value, file)
    best = min(rows, key=lambda row: row["kid"]["value"])
    adopted = is_better(best["kid"]["value"], trained._asdict(), best["difference"]["high"])
    if adopted:
        _adopt(run, saved.tensors | rebuilt_average(run, best["length"]), best["length"])
    else:
        run.discard("diffusion")
    change = "{value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**best["difference"])
    print(
        f"   length {best['length']:.2f} has the least KID, {change} beside the one chosen in training, which"
    )
    print(
        "   it takes the place of" if adopted else "   stays: the interval of the difference is not below 0"
    )
    return {"trained": trained._asdict(), "rows": rows, "length": best["length"], "adopted": adopted}


def _adopt(run, tensors, length):
    """Lets the averages among the tensors draw from now on."""
    averaged = {name: tensor for name, tensor in tensors.items() if name.startswith("ema_")}
    run.finish("diffusion", averaged, {"step": snapshots_of(run)[-1], "length": length})


def _say(label, estimate):
    print(f"   {label}: {estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]", flush=True)
