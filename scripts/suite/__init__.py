"""Parts of `scripts/gpu_suite.py`."""
