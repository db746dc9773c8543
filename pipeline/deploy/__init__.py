"""To a device and back."""
