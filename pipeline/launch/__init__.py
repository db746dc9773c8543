"""The command: from a configuration to stages that run."""
