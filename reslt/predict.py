"""Keeps `python -m reslt.predict` short; the code is in `reslt.deploy.predict`."""

from reslt.deploy.predict import main

if __name__ == "__main__":
    main()
