"""The stages: one file each, whose `run` turns inputs into a result. A stage imports no other stage."""
