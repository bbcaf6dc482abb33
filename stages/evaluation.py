"""The order of the work: a trained run's KID, and which average of its weights has the least."""

import config as settings
from checkpoint import RunFolder, assign, named_variables
from evaluate import measured_kid, plot_sweep
from files import atomic_file
from generate import Painter, drawing, load, rebuilt_average, snapshots_of
from metrics import KID, Estimate
from model.perceptual import FeatureNetwork
from stages.data import prepared_data
from stages.devices import strategy_on
from stages.latent_diffusion import protocol_of

SWEPT_LENGTHS = (0.03, 0.04, 0.05, 0.06, 0.08, 0.10, 0.12, 0.15, 0.20)


def evaluate(path, ema_sweep=False) -> dict:
    """Measures the KID of a trained run as its training did, and writes it with its protocol as `metrics.json`.

    Args:
        path: the run's folder.
        ema_sweep: whether to measure averages of other lengths too, see `averages`. The best of them draws from then
            on if it has a lower KID than the weights that training has chosen, both of the same noise.

    Returns:
        What `metrics.json` holds.

    Raises:
        InputError: a run that is not trained, or its data, cannot be used; or it has kept no averages.
    """
    networks, config = load(path)
    if ema_sweep:
        snapshots_of(RunFolder.read(path))  # before anything is measured
    strategy_on(config.gpus, {})
    with RunFolder.open(path, settings.to_dict(config)) as run:
        data = prepared_data(config, run)
        measure = _Measurement(config, networks, data)
        protocol = protocol_of(config, measure.kid, len(data.validation_ids), len(measure.tokens))
        result = {"kid": measure()._asdict(), "floor": measure.kid.floor().value, "protocol": protocol}
        _say("KID", result["kid"])
        if ema_sweep:
            result["ema_sweep"] = _swept(run, networks, measure)
        run.write_json("metrics.json", result)
    return result


class _Measurement:
    """KID of whatever weights the networks have."""

    def __init__(self, config, networks, data):
        judge = config.evaluation
        self.painter = Painter(networks, config.image_size, judge.batch_size)
        self.kid = KID(FeatureNetwork(judge.network, judge.size, judge.weights))
        held_out = data.whole(data.validation_ids, config.image_size)
        self.kid.set_real(self.kid.feature_network(held_out, progress=True))
        self.tokens, self.drawing = data.validation_tokens[: judge.images], drawing(config)

    def __call__(self) -> Estimate:
        return measured_kid(self.painter, self.kid, self.tokens, **self.drawing)


def _swept(run, networks, measure):
    """KID of every length; the best takes the place of the weights that draw if it is better than training's."""
    saved = run.best("diffusion") or run.latest("diffusion")
    _assign(networks, saved.tensors, run)
    trained = measure()
    _say("chosen in training", trained._asdict())
    rows = []
    for length in SWEPT_LENGTHS:
        _assign(networks, saved.tensors | rebuilt_average(run, length), run)
        value, low, high = measure()
        rows.append({"length": length, "kid": value, "low": low, "high": high})
        _say(f"length {length:.2f}", {"value": value, "low": low, "high": high})
    with atomic_file(run.sweep_path) as file:
        plot_sweep(rows, trained.value, file)
    best = min(rows, key=lambda row: row["kid"])
    gain = trained.value - best["kid"]
    if gain > 0:
        tensors = saved.tensors | rebuilt_average(run, best["length"])
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("ema_")}
        run.finish("diffusion", tensors, {"length": best["length"], "kid": best["kid"], "gain": gain})
        print(f"   length {best['length']:.2f} has the least KID, {gain:.4f} less; it draws from now on")
    else:
        print(f"   none has a lower KID; the best, of length {best['length']:.2f}, has {-gain:.4f} more")
    return {"trained": trained._asdict(), "rows": rows, "length": best["length"], "gain": gain}


def _assign(networks, tensors, run):
    for name in ("unet", "text_encoder"):
        assign(named_variables(getattr(networks, name)), tensors, f"ema_{name}", source=run.path)


def _say(label, estimate):
    print(f"   {label}: {estimate['value']:.4f} [{estimate['low']:.4f}, {estimate['high']:.4f}]", flush=True)
