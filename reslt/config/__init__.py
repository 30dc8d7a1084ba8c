"""The settings of a run: schema, checks, and the combination of flags, recipes and defaults. Loads no torch."""
