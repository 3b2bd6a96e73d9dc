"""Experiments: policies beside baselines on real answers, as figures, plots and a page."""
