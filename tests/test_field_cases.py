"""Small inputs that people have, and attacks that were tried: each with the right outcome, not only the exit code."""

from __future__ import annotations

# ---- What a model's outputs mean: class names travel with runs and are compared wherever a model meets data ----

# ---- Results of other evaluations, reports ----

# ---- A run folder contains one run ----

# ---- Photos: every image accounted for ----

# ---- Photos: tables, JSON, metadata files ----

# ---- Class order and class names ----

# ---- Growing a dataset, copies ----

# ---- Strangers' files: recipes, info.yaml, run folders, checkpoints, folded files ----

# ---- What --overwrite may delete ----

# ---- Text from data ----

# ---- Two processes at once ----

# ---- Caches ----

# ---- What is not essential does not end a run; invariants are checked where numbers are used ----

# ---- Processes that wait, ranks that differ ----

# ---- Pipes, devices, and faults of the environment ----
