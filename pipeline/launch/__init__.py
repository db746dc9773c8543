"""The command, which turns a configuration into stages and runs them."""
