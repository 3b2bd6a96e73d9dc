"""Training, calibration, evaluation and export of bestroute's router and reward model."""
