"""The decision: which engine to ship, and what the figures rest on."""
