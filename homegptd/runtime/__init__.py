"""Runs the machine: the one owner of the state, its tasks and its time."""
