"""Training: one loop, random views, and one objective for each family of networks."""
