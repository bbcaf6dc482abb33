"""What benchmarks that train whole runs share: a run by its command, and the rows of its log."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def rows_of(command, flags):
    """Trains a run, which goes on where it stood and does nothing if it is finished; returns the rows of its log.

    Args:
        command: "train" or "train-vae".
        flags: by name, without dashes, with `run` among them; None for one that takes no value, a tuple for several.
    """
    words = [command]
    for flag, value in flags.items():
        values = () if value is None else value if isinstance(value, tuple) else (value,)
        words += [f"--{flag}", *map(str, values)]
    subprocess.run([sys.executable, ROOT / "cup3.py", *words], check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (Path(flags["run"]) / "log.jsonl").read_text().splitlines()]
