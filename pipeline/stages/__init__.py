"""The stages, one file each. The function `run` of a stage turns inputs into a result. A stage imports no other stage."""
