"""Training of draft predictors."""
