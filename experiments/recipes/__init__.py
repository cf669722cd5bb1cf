"""Named settings of runs, one a file: `python -m experiments.cifar --recipe=NAME`.

Those of streamed data sets are for `python -m experiments.imagenet` in its place.

The docstring of a recipe has its command, hardware, time and expected accuracy, and says so where
these are not measured; those of ssa were measured up to commit b9ffb74, with linear paths (see
"Exact paths" in docs/research.md). Its FIELDS are fields of `ssa_jax.runs.config.Config`. They
become the defaults of the flags, so a flag that is given overrides them.
"""

from typing import Any

from experiments.recipes import (
    cifar10_mlp_ssa,
    cifar10_resnet32_bp,
    cifar10_resnet32_ssa,
    cifar10_smallconv_bp,
    cifar10_smallconv_dfa,
    cifar10_smallconv_ssa,
    cifar10_smallconv_ssa_hybrid,
    cifar10_vgg13_bp,
    cifar10_vgg13_ssa,
    digits_mlp_ssa,
    tiny_imagenet10_resnet18_ssa,
)

RECIPES: dict[str, dict[str, Any]] = {
    "cifar10_smallconv_bp": cifar10_smallconv_bp.FIELDS,
    "cifar10_smallconv_dfa": cifar10_smallconv_dfa.FIELDS,
    "cifar10_smallconv_ssa": cifar10_smallconv_ssa.FIELDS,
    "cifar10_smallconv_ssa_hybrid": cifar10_smallconv_ssa_hybrid.FIELDS,
    "cifar10_mlp_ssa": cifar10_mlp_ssa.FIELDS,
    "cifar10_vgg13_bp": cifar10_vgg13_bp.FIELDS,
    "cifar10_vgg13_ssa": cifar10_vgg13_ssa.FIELDS,
    "cifar10_resnet32_bp": cifar10_resnet32_bp.FIELDS,
    "cifar10_resnet32_ssa": cifar10_resnet32_ssa.FIELDS,
    "digits_mlp_ssa": digits_mlp_ssa.FIELDS,
    "tiny_imagenet10_resnet18_ssa": tiny_imagenet10_resnet18_ssa.FIELDS,
}
