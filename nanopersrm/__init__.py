"""nanopersrm: a personalized reasoning reward model for one GPU, written to be read.

Import the part you need (`from nanopersrm.judge.judge import Judge`). This file stays light, so
that what reads text never pulls in torch. README.md has the map.
"""

import kernels.process  # noqa: F401  (threads and memory, before anything imports torch)

__version__ = "0.1.0"


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line: what was expected, what came, and where. The scripts print it as
    `judge.py: error: …` and leave with exit code 2; library callers see the exception.
    """
