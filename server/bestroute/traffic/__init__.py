"""What is learned from the traffic: a log of decisions, how they turned out, and drift."""
