"""Python API: load a teacher and a predictor, decode, collect, train, evaluate, bench and tune."""
