"""Use of a trained model: predictions for new photos, and files for other programs."""
