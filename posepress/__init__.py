"""Run an engine on images. Users import this package, and packages for devices contain it."""
