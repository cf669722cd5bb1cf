"""What `--help` prints: every flag of a program in groups, with its default and its choices."""

import dataclasses
import sys
import textwrap
from typing import Any

from absl import flags

from experiments.recipes import RECIPES
from ssa_jax.runs.config import Config

# Every setting is in one of them, by test; the first holds what people turn first.
GROUPS = {
    "First": (
        "method", "model", "dataset", "epochs", "batch_size", "learning_rate", "rank_schedule",
        "rank_init", "seed", "workdir",
    ),
    "A run": (
        "recipe", "resume", "max_steps", "save_every", "keep_checkpoints", "on_nan", "watch",
        "callbacks", "tensorboard", "compile_cache",
    ),
    "Data": (
        "data_dir", "train_size", "validation", "image_size", "crop_area", "workers", "on_corrupt",
    ),
    "Optimiser": (
        "optimizer", "warmup_steps", "schedule_steps", "weight_decay", "drop_path", "first_rate",
        "projection", "retraction", "retract_every", "drift_bound",
    ),
    "Local loss": (
        "loss", "alpha", "beta", "gamma", "kappa", "label_smoothing", "hoyer", "local_weight",
        "readout", "readout_update", "readout_rate", "aux_depth",
    ),
    "Feedback": (
        "feedback", "feedback_update", "feedback_every", "feedback_rate", "feedback_form",
        "feedback_limit_mib", "feedback_lookahead", "feedback_rank", "feedback_basis",
        "feedback_energy", "unit_size", "warmup_method", "warmup_epochs", "warmup_until",
    ),
    "Ranks": (
        "factorize", "rank_target", "rank_floor", "rank_budget", "budget_kind", "rank_exclude",
        "rank_cuts", "energy",
    ),
    "Hardware": (
        "precision", "memory", "steps_per_dispatch", "batch_statistics", "shard_params", "stages",
        "micro_batches", "distributed", "coordinator_address", "num_processes", "process_id",
    ),
}  # fmt: skip
ASKED = ("-h", "--help", "-help", "--helpfull", "--helpshort")


def text(doc: str) -> str:
    """The help of a program: its own words, then all flags that it has defined."""
    settings = {f.name: f for f in dataclasses.fields(Config)}
    lines = [doc.strip()]
    groups = dict(GROUPS) if "method" in flags.FLAGS else {}
    extra = tuple(sorted(_own_flags() - (settings.keys() if groups else set())))
    for title, names in (*groups.items(), ("This program", extra)):
        if names:
            lines += ["", f"{title}:", *(_flag(flags.FLAGS[name]) for name in names)]
    return "\n".join(lines)


def _own_flags() -> set[str]:
    """The flags that the program and this project's modules have defined."""
    by_module = flags.FLAGS.flags_by_module_dict()
    ours = [m for m in by_module if m == sys.argv[0] or m.startswith("experiments.")]
    return {flag.name for module in ours for flag in by_module[module]}


def _flag(flag: Any) -> str:
    field = {f.name: f for f in dataclasses.fields(Config)}.get(flag.name)
    # Of a setting its own words: absl's have the choices appended.
    words = field.metadata["help"] if field else " ".join(str(flag.help).split())
    choices = (field.metadata.get("choices") if field else None) or getattr(
        flag.parser, "enum_values", ()
    )
    if flag.name == "recipe":
        choices = ("none", *RECIPES)
    boolean = isinstance(flag.default, bool)
    head = f"  --[no]{flag.name}" if boolean else f"  --{flag.name}={_shown(flag)}"
    body = [words] + ([f"One of {', '.join(choices)}."] if choices else [])
    if boolean:
        body.append(f"Default: {'on' if flag.default else 'off'}.")
    return (
        head
        + "\n"
        + textwrap.fill(" ".join(body), 96, initial_indent="      ", subsequent_indent="      ")
    )


def _shown(flag: Any) -> str:
    if flag.default is None and isinstance(flag.parser, flags.IntegerParser):
        return "N"
    return "''" if flag.default in (None, "") else str(flag.default)
