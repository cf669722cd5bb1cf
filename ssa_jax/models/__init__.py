"""Models by name. A model is an ordinary NNX module that marks its units by `cut`."""

from collections.abc import Callable

from flax import nnx

from ssa_jax.models.efficientnet import efficientnet_b0
from ssa_jax.models.feedforward import mlp, smallconv, vgg11, vgg13
from ssa_jax.models.imagenet import resnet18, resnet50
from ssa_jax.models.mobilenet import mobilenet_v2, mobilenet_v3_small
from ssa_jax.models.residual import plain32, resnet32, resnet32_conv, resnet32_identity
from ssa_jax.models.vit import vit_small, vit_tiny

MODELS: dict[str, Callable[..., nnx.Module]] = {
    "mlp": mlp,
    "smallconv": smallconv,
    "vgg13": vgg13,
    "resnet32": resnet32,
    "resnet32_conv": resnet32_conv,
    "resnet32_identity": resnet32_identity,
    "plain32": plain32,
    "vgg11": vgg11,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3_small": mobilenet_v3_small,
    "efficientnet_b0": efficientnet_b0,
    "vit_tiny": vit_tiny,
    "vit_small": vit_small,
}
