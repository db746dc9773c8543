"""The backends, which build and run engines. Each imports its runtime only when it is used."""
