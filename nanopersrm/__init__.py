"""nanopersrm: a personalized reasoning reward model for one GPU, written to be read.

Import the part you need (`from nanopersrm.judge import Judge`); this file stays light so that the
text side never pulls in torch. Where to read first: the walk through the code in README.md.
"""

import os

__version__ = "0.1.0"

# Threads of GNU OpenMP spin while they wait for each other. When another program wants the same
# core, that turned a decode step of 40 ms into one of 230 to 580 ms (2 cores, 1 of them busy).
# Sleeping threads do not. This is read once, when torch is first imported; set it to choose.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line: what was expected, what came, and where. The scripts print it as
    `judge.py: error: …` and leave with exit code 2; library callers see the exception.
    """
