"""Quality, speed and losslessness of predictors."""
