"""People from heatmaps and part affinity fields (PAFs)."""
