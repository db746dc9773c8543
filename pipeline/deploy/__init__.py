"""Packages for a device, and the import of the device's results."""
