"""Results on disk: where each lies, what it was made from, and whether it is still good."""
