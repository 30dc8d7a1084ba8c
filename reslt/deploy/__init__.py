"""A trained model in use: predictions for new photos, and files for other programs."""
