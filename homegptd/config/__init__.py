"""YAML text in, frozen settings out; every problem at once, each with its line."""
