"""The version. It has its own module, so that a new version makes no result stale."""

VERSION = "0.1.0"
