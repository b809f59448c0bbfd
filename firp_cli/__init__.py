"""firp: draft predictors that let a frozen LLM emit several tokens per forward pass, losslessly."""

__version__ = "0.1.0"
