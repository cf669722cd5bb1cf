"""The flag that compiles a run for devices that are not here, in place of training."""

from absl import flags as absl_flags

from ssa_jax.runs import inputs, plan
from ssa_jax.runs.config import Config


def define() -> None:
    """Defines `--plan`."""
    absl_flags.DEFINE_string(
        "plan",
        "",
        "Trains nothing and prints what the run would be on h100, v5e:AxB or v5p:AxBxC: memory, "
        "kernels, collectives, seconds to compile.",
    )


def shown(config: Config) -> bool:
    """Prints the plan where one is asked for; whether one was."""
    name = absl_flags.FLAGS.plan
    if name:
        for line in plan.lines(config, inputs.load(config), name):
            print(line, flush=True)
    return bool(name)
