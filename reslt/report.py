"""Keeps `python -m reslt.report` working; the code is in `reslt.runs.report`."""

from reslt.runs.report import main

if __name__ == "__main__":
    main()
