"""The only room that knows file names in a run folder: atomic save, resume, keep best, keep last.

    config.json            everything the run was asked for, after defaults
    log.jsonl              a row an epoch
    vocabulary.json        the words, or classes, the text encoder knows
    curves.png, samples/   what to look at
    metrics.json, ema_sweep.*     what `evaluate` has measured
    cache/                 what can be made again: latents, text embeddings
    checkpoints/<stage>/<step>/   all that resume needs, the newest two
    averages/<stage>/<step>/      averages of the weights now and then, to rebuild others from
    best/<stage>/          the weights that the monitored metric chose
    networks/<stage>/      the final weights of a finished stage, or those that an evaluation has settled on
    .lock                  held by the one process that may write

Each folder of the last four kinds is an *entry* (`checkpoint.entries`): there as a whole or not at all.
"""

from checkpoint.entries import Saved
from checkpoint.run_folder import RunFolder, is_better
from checkpoint.weights import assign, collect, named_variables

__all__ = ["RunFolder", "Saved", "assign", "collect", "is_better", "named_variables"]
