"""Keeps `python -m reslt.export` short; the code is in `reslt.deploy.export`."""

from reslt.deploy.export import main

if __name__ == "__main__":
    main()
