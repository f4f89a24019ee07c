"""Experiments over data conditions: the only part that uses both the writing and the reading wing."""
