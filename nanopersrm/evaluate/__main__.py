"""`python -m nanopersrm.evaluate`."""

import shlex
import sys

import tyro

from nanopersrm.evaluate import evaluate

if __name__ == "__main__":
    command = f"python -m nanopersrm.evaluate {shlex.join(sys.argv[1:])}"
    about = (evaluate.__doc__ or "").split("How it works")[0]
    config = tyro.cli(evaluate.Config, prog="python -m nanopersrm.evaluate", description=about)
    sys.exit(evaluate.run(config, command))
