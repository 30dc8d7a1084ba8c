"""Evaluation: from branch logits to accuracies per class, shot group and branch, tables and figures."""
