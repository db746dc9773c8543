"""Pruning: find the channel groups of a network, rank their channels, choose how many to keep, and remove the rest."""
