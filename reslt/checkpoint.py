"""Keeps `python -m reslt.checkpoint convert` working; the code is in `reslt.runs.convert`."""

from reslt.runs.convert import main

if __name__ == "__main__":
    main()
