"""The runner with a clock that a test sets forward: `Ahead` in the test, this program in the runner's process."""

import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
VARIABLE = "CLOCK_AHEAD_FILE"


class Ahead:
    """How far the clock of a runner is ahead of the machine's, in a file. `environ` is for the runner."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seconds = 0.0
        self.environ = {VARIABLE: str(file)}
        self.forward(0)

    def forward(self, seconds: float) -> None:
        """Let time pass."""
        self._seconds += seconds
        whole = self._file.with_suffix(".new")
        whole.write_text(str(self._seconds))
        whole.rename(self._file)


def main() -> int:
    sys.path.insert(0, str(ROOT))
    import app
    import runner
    import serving
    from settings import Settings

    file = Path(os.environ[VARIABLE])

    def create_app(settings: Settings) -> app.App:
        return app.App(settings, clock=lambda: time.monotonic() + float(file.read_text()))

    serving.create_app = create_app  # type: ignore[attr-defined]
    return runner.main()


if __name__ == "__main__":
    sys.exit(main())
