"""python -m nanopersrm.serve, see `server.py`."""

import sys

import tyro

try:
    from nanopersrm.serve import server
except ModuleNotFoundError as error:
    print(f"nanopersrm.serve: error: {error}; pip install 'nanopersrm[serve]'", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    about = (server.__doc__ or "").split("Errors are")[0]
    sys.exit(server.run(tyro.cli(server.Config, prog="nanopersrm.serve", description=about)))
