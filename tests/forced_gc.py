"""The command line under stress: the garbage collector runs every 5 ms, whatever the program does.

An event loop holds much only weakly (tasks, transports whose peer has ended its half). What nobody else holds is gone
within one collection; in ordinary life that shows once a week, here at once. Takes the arguments of `runner.py`.
"""

import gc
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import runner

PERIOD_S = 0.005


def collect_forever() -> None:
    """Collect, and again."""
    pause = threading.Event()
    while not pause.wait(PERIOD_S):
        gc.collect()


if __name__ == "__main__":
    gc.freeze()  # The modules are no part of it, and would make each collection long.
    threading.Thread(target=collect_forever, daemon=True).start()
    sys.exit(runner.main(sys.argv[1:]))
