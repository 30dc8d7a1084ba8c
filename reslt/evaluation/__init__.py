"""From branch logits to accuracies per class, shot group and branch."""
