"""Builds everything and owns the process: arguments, wiring, signals, exit codes, the demo."""
