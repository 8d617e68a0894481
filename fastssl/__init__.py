"""Fast kernels, thin models and a trainer for self-supervised visual pretraining.

    run = fastssl.pretrain("moco_v2", data="folder:photos")   trains and returns the run
    run = fastssl.open_run("runs/moco_v2-folder")             opens a run folder
    run.knn(); run.linear(); run.report(); run.encoder()      uses it: see `fastssl.Run`

`fastssl.ops` has the ops, `fastssl.nn` drop-in modules, and `fastssl.methods` the methods. Ops and modules need only
torch, numpy and safetensors; pretraining and evaluation need the extra `train`.
"""

__version__ = "0.2.0.dev0"

# loaded at first use, so that `import fastssl` stays light
_LAZY = {"pretrain": "pretraining", "open_run": "run", "Run": "run"}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    from fastssl.extras import need_train

    need_train(f"fastssl.{name}")
    value = globals()[name] = getattr(importlib.import_module(f"fastssl.{_LAZY[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
