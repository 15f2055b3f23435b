"""Explains differences: where they arise and what they are in algebra. Nothing here decides a verdict."""
