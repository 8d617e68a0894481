"""Fast kernels, thin models and a trainer for self-supervised visual pretraining.

`fastssl.ops` computes, `fastssl.nn` are modules to drop in, `fastssl.methods` the models. See README.md.
"""

__version__ = "0.2.0.dev0"
