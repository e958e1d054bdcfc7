"""How long one waits for the command's help, for `import mechlens`, and for the main job.

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

from common import Row, print_table

THREADS = "2"
REPEATS = 7
COMMAND = [sys.executable, "-c", "from mechlens.cli import main; main()"]
BUNDLED = Path(__file__).parent.parent / "mechlens" / "models" / "bundled" / "model.safetensors"


def seconds(command: Sequence[str], repeats: int = REPEATS) -> float:
    """Median wall time of a command in a process of its own, once it and its files are known to the system.

    Raises:
        subprocess.CalledProcessError: it fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": THREADS}
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(
            command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment
        )
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--no-reproduce", action="store_true", help="leave out the main job")
    options = parser.parse_args()
    lazy = "import mechlens, sys; sys.exit('torch' in sys.modules)"
    rows = [
        Row("Python itself", seconds([sys.executable, "-c", "pass"]), "s"),
        Row("import mechlens, without torch", seconds([sys.executable, "-c", lazy]), "s", 0.3),
        Row("mechlens --help", seconds([*COMMAND, "--help"]), "s", 0.6),
        Row("mechlens reproduce --help", seconds([*COMMAND, "reproduce", "--help"]), "s", 0.6),
    ]
    if BUNDLED.is_file() and not options.no_reproduce:
        with tempfile.TemporaryDirectory(prefix="mechlens-") as folder:
            job = [*COMMAND, "reproduce", "--quiet", "--out", folder]
            rows.append(Row("mechlens reproduce, bundled model", seconds(job, 1), "s", 60))
    print_table(f"start-up: wall time of fresh processes, median of {REPEATS}, the main job once", rows)


if __name__ == "__main__":
    main()
