"""Creating, fetching and checking datasets: `python -m reslt.prepare`, see `__main__.py`."""
