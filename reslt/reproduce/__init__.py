"""`python -m reslt.reproduce`: train the runs of a table or figure of the paper, and compare them with its numbers."""
