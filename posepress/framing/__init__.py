"""Which part of an image becomes which network input."""
