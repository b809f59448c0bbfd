"""Draft predictors: one file per method."""
