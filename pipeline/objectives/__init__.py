"""Training objectives: one module for the targets of each family of networks."""
