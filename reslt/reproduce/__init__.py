"""`python -m reslt.reproduce`: the runs of a table or figure of the paper, compared with the paper's numbers."""
