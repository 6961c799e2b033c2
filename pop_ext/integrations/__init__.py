"""Other programs that run POP."""
