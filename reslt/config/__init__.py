"""The settings of a run: their schema, their checks, and how flags, recipes and defaults are combined. Loads no torch."""
