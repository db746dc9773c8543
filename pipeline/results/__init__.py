"""Results on disk: the place of each, the inputs it was made from, and whether it is still valid."""
