"""`python -m nanopersrm.evaluate`."""

import shlex
import sys

import tyro

from nanopersrm.evaluate.evaluate import Config, __doc__, run

if __name__ == "__main__":
    about = (__doc__ or "").split("How it works")[0]
    config = tyro.cli(Config, prog="python -m nanopersrm.evaluate", description=about)
    sys.exit(run(config, f"python -m nanopersrm.evaluate {shlex.join(sys.argv[1:])}"))
