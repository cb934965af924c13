"""python -m nanopersrm.serve, see `server.py`."""

import sys

import tyro

from nanopersrm.command import exit_code

try:
    from nanopersrm.serve import server
except ModuleNotFoundError as error:
    print(f"nanopersrm.serve: error: {error}; pip install 'nanopersrm[serve]'", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    about = (server.__doc__ or "").split("Errors are")[0]
    config = tyro.cli(server.Config, prog="python -m nanopersrm.serve", description=about)
    sys.exit(exit_code("nanopersrm.serve", lambda: server.main(config), interrupted="stopped"))
