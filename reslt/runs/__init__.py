"""A run on disk: its folder, checkpoints, summary and reports."""
