"""Judging predictors: quality, speed, losslessness."""
