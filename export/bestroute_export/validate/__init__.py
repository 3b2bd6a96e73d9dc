"""What is wrong with a data file, and what it can and can't train."""
