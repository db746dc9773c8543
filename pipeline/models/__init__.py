"""The networks, with one file for each, and code that saves and loads them without pickle."""
