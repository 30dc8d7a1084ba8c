"""`python -m reslt.reproduce`: the runs behind a table or figure of the paper, and ours beside the paper's numbers."""
