"""What both ends of a wire share. Standard library only: the CLI imports it on every start."""
