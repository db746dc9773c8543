"""From a network's outputs to what it found."""
