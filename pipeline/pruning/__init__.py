"""Pruning: the channel groups of a network, what they are worth, how many of them are kept, and removing the rest."""
