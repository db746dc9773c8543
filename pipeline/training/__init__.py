"""Training: one loop, random views, and one objective a family of networks."""
