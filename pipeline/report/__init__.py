"""The report: which engine to ship, and the evidence for this choice."""
