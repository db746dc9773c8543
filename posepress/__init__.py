"""Run an engine on images: what users import, and what a device takes home."""
