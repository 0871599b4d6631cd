"""How fast it is, beside the engine itself and HAProxy: `make bench`, docs/performance.md.

    __main__.py    the command line: which loads, how large, where the figures go
    figures.py     what was measured, round by round; medians, and ratios within a round
    marks.py       what the figures are held against
    report.py      the tables, the JSON, what docs/performance.md takes from them
    subjects.py    what is measured: the engine's socket, HAProxy, the runner, the bridge before it
    stage.py       what a run makes on the engine, and takes away again
    parts.py       the runner with a clock on each of its parts, for the profile
    plot.py        the picture
    exchange.py    the generator's side of a connection: requests signed beforehand, answers read and counted

The other files are the loads, one or a few functions each.
"""
