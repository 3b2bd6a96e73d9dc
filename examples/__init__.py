"""Programs to run and to start from; each one's docstring says how."""
