"""What benchmarks share: a run by its command with the rows of its log, and how figures are told."""

import json
import subprocess
import sys
from pathlib import Path

from errors import InputError
from files import atomic_file

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


def tell(name, measure, options):
    """Prints what `measure(options)` finds and, if asked, writes it as JSON, to `options.json`.

    Returns:
        The exit code: 2 and a line that begins with the benchmark's name for what the user gave, else 0.
    """
    try:
        report = json.dumps(measure(options), indent=2)
        print(report)
        if options.json:
            with atomic_file(options.json) as file:
                file.write(f"{report}\n".encode())
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return 0
