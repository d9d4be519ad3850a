"""Callbacks that step the Schedule in other people's training loops, a file a library."""
