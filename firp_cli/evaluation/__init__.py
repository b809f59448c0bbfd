"""Quality, speedup and losslessness of predictors."""
