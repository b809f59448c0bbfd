"""firp: draft predictors that let a frozen LLM emit several tokens per forward pass, losslessly.

The names below are imported when they are first used: `import firp_cli` imports no torch.

    >>> import firp_cli
    >>> decoder = firp_cli.load("arithmetic", "firp")
    >>> answer = decoder.generate("Tom has 9 pens and loses 2. How many pens are left?", max_new_tokens=64)
    >>> answer.text, answer.accepted_length
"""

import importlib

__version__ = "0.1.0"

_PLACES = {
    "load": "firp_cli.api.decoder",
    "Decoder": "firp_cli.api.decoder",
    "collect": "firp_cli.api.collect_run",
    "write_prompts": "firp_cli.api.collect_run",
    "train": "firp_cli.api.train_run",
    "evaluate": "firp_cli.api.eval_run",
    "tune": "firp_cli.api.tune_run",
    "bench": "firp_cli.api.bench_run",
    "write_report": "firp_cli.api.write_report",
    "Recipe": "firp_cli.config",
    "TeacherConfig": "firp_cli.config",
    "BenchSettings": "firp_cli.evaluation.methods",
    "PromptSettings": "firp_cli.collecting.own_prompts",
    "TuneSettings": "firp_cli.tuning.calibration",
    "EngineOptions": "firp_cli.decoding.engine",
    "LayerBackend": "firp_cli.api.loading",
    "Generation": "firp_cli.results",
    "BenchReport": "firp_cli.results",
    "EvalReport": "firp_cli.results",
    "TuneReport": "firp_cli.tune_results",
    "FirpError": "firp_cli.errors",
}
__all__ = ["__version__", *_PLACES]  # __init__.pyi gives the types


def __getattr__(name: str) -> object:
    """Import a public name at its first use."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
