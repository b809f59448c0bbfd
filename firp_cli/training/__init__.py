"""Training draft predictors."""
