"""What examples/demo.py is made of."""
