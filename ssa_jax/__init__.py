"""Local learning on low-rank manifolds with JAX and Flax."""

__version__ = "0.1.0"
