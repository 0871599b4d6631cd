"""The command line, which on SIGUSR1 says on stderr how many tasks it has. Takes the arguments of `runner.py`."""

import asyncio
import gc
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import runner


def count(_number: int, _frame: object) -> None:
    """Count them, in every loop."""
    gc.collect()
    tasks = [each for each in gc.get_objects() if isinstance(each, asyncio.Task) and not each.done()]
    print(f"tasks {len(tasks)}: {tasks}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, count)
    sys.exit(runner.main(sys.argv[1:]))
