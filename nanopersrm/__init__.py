"""nanopersrm: a personalized reasoning reward model for one GPU, written to be read.

Import the part you need (`from nanopersrm.judge import Judge`); this file stays light so that the
text side never pulls in torch. Where to read first: the walk through the code in README.md.
"""

import os

__version__ = "0.1.0"

# Threads of GNU OpenMP spin while they wait for each other, by default for a long time. When
# another program wants the same core, that turned a decode step of 15 ms into one of 230 to 580 (2
# cores, 1 of them busy). To spin briefly costs 21 ms on idle cores and 32 to 44 on busy ones; not
# at all, 27 and 24 to 34. Read once, when torch is first imported; set it yourself to choose.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line: what was expected, what came, and where. The scripts print it as
    `judge.py: error: …` and leave with exit code 2; library callers see the exception.
    """
