"""Image lists, dataset folders, and the class groups derived from them. Loads no torch."""
