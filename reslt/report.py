"""Keeps `python -m reslt.report` working; the code is in `reslt.runs.report_command`."""

from reslt.runs.report_command import main

if __name__ == "__main__":
    main()
