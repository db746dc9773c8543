"""Posepress turns a trained pose network into the smallest and fastest engine that keeps its accuracy."""
