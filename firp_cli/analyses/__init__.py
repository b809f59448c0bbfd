"""Analyses of the papers on a teacher and a predictor, one file each."""
