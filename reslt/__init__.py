"""Long-tailed image recognition: ResLT on any timm model.

The names in `__all__` are imported on first use, so that `import reslt` does not import torch."""

from importlib import import_module

__all__ = [
    "ResLTLoss",
    "create_model",
    "list_methods",
    "list_recipes",
    "load_dataset",
    "load_folded",
    "load_run",
    "register",
    "register_method",
    "shot_accuracy",
]

_MODULES = {
    "ResLTLoss": "reslt.methods.losses",
    "create_model": "reslt.api",
    "list_methods": "reslt.config.methods",
    "list_recipes": "reslt.config.recipes",
    "load_dataset": "reslt.data.datasets",
    "load_folded": "reslt.api",
    "load_run": "reslt.api",
    "register": "reslt.config.parts",
    "register_method": "reslt.config.methods",
    "shot_accuracy": "reslt.evaluation.metrics",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'reslt' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([name for name in globals() if name.startswith("__")] + __all__)
