"""The version, in a module of its own: a new one makes no result stale."""

VERSION = "0.1.0"
