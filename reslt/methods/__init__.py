"""Training objectives: losses and the named methods that use them."""
