"""Time to show each command's help or an error, to import mechlens, and to run `mechlens reproduce`.

python benchmarks/startup.py [--no-reproduce]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import Row, print_rows

from mechlens.cli.commands import every

THREADS = "2"
REPEATS = 7
REFUSED = 2
"""Exit code for invalid input."""
COMMAND = [sys.executable, "-c", "from mechlens.cli import main; main()"]
BUNDLED = Path(__file__).parent.parent / "mechlens" / "models" / "bundled" / "model.safetensors"


def seconds(command: Sequence[str], repeats: int = REPEATS) -> float:
    """Median wall time of a command in a new process.

    Raises:
        subprocess.CalledProcessError: the exit code is neither 0 nor 2.
    """
    environment = os.environ | {"OMP_NUM_THREADS": THREADS}
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        times.append(time.perf_counter() - start)
        if done.returncode not in (0, REFUSED):
            done.check_returncode()
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--no-reproduce", action="store_true", help="skip `mechlens reproduce`")
    options = parser.parse_args()
    rows = [
        Row("Python itself", seconds([sys.executable, "-c", "pass"]), "s"),
        Row("import mechlens", seconds([sys.executable, "-c", "import mechlens"]), "s", 0.1),
    ]
    waits = [(*words, "--help") for words in every()]
    waits += [("bogus",), ("--bogus",), ("lens", "--bogus"), ("features", "bogus")]
    for words in waits:
        rows.append(Row(f"mechlens {' '.join(words)}", seconds([*COMMAND, *words]), "s", 0.3))
    # typer imports pydantic to convert values, which takes as long as everything else
    rows.append(Row("mechlens patch --site mlp", seconds([*COMMAND, "patch", "--site", "mlp"]), "s"))
    if BUNDLED.is_file() and not options.no_reproduce:
        with tempfile.TemporaryDirectory(prefix="mechlens-") as folder:
            job = [*COMMAND, "reproduce", "--quiet", "--out", folder]
            rows.append(Row("mechlens reproduce, bundled model", seconds(job, 1), "s", 60))
    print_rows(f"startup: wall time of new processes, median of {REPEATS}; `reproduce` once", rows)


if __name__ == "__main__":
    main()
