"""`sama-jax finetune` and `sama-jax pretrain`: training by a kind's own loss."""

import argparse
from pathlib import Path
from typing import Any

from sama_jax.cli import flags
from sama_jax.cli.running import command_of
from sama_jax.config import TrainSettings
from sama_jax.programs.jobs import AuditJob


def add(commands: Any) -> None:
    """Adds both commands and their flags."""
    p = command_of(
        commands, "finetune", "Fine-tune a model folder by its kind's own loss.", finetune
    )
    p.add_argument("--base", type=Path, required=True, metavar="DIR", help="model folder")
    p.add_argument(
        "--as",
        dest="as_kind",
        choices=["diffusion"],
        help="make a diffusion model of a causal one: attention opened, a mask token added",
    )
    flags.flags_of(
        p, AuditJob, "attention_mask", help="what is seen in training (default: as the base says)"
    )
    flags.flags_of(_add_training(p), TrainSettings, "lora", "dp")
    p = command_of(
        commands, "pretrain", "Train a model from a config.json and a tokenizer.", pretrain
    )
    p.add_argument("--config", type=Path, required=True, metavar="FILE", help="config.json")
    p.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: train one on the data")
    _add_training(p)


def _add_training(p: flags.Flags) -> flags.Flags:
    """Adds what both commands have; returns the group of the training's own settings."""
    p.add_argument("--data", type=Path, required=True, metavar="FILE", help="texts")
    p.add_argument("--held-out", type=Path, metavar="FILE", help="texts for the NLL at the end")
    flags.add_text_fields(p)
    flags.add_conversations(p)
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new model folder")
    training = p.add_argument_group("training")
    flags.flags_of(
        training,
        TrainSettings,
        "epochs",
        "batch_size",
        "accumulate",
        "learning_rate",
        "max_length",
        "dtype",
        "seed",
        "train_on_padding",
        "snapshot_every",
    )
    flags.add_set(training)
    flags.add_quiet(p)
    return training


def finetune(args: argparse.Namespace) -> None:
    """Trains a model folder further."""
    settings = flags.settings_of(args, TrainSettings)
    from sama_jax.programs.finetune import finetune
    from sama_jax.programs.forms import form_of
    from sama_jax.texts.read import Fields

    form = form_of(args.template, args.loss_on, args.end_tokens, args.base)
    finetune(
        args.base,
        args.data,
        args.out,
        settings,
        heldout=args.held_out,
        quiet=args.quiet,
        as_diffusion=args.as_kind == "diffusion",
        attention_mask=args.attention_mask,
        fields=Fields(args.text_field, args.label_field, form),
    )


def pretrain(args: argparse.Namespace) -> None:
    """Trains a new model."""
    settings = flags.settings_of(args, TrainSettings, windows=True)
    from sama_jax.programs.finetune import pretrain
    from sama_jax.programs.forms import form_of
    from sama_jax.texts.read import Fields

    form = form_of(args.template, args.loss_on, args.end_tokens, None)
    pretrain(
        args.config,
        args.data,
        args.out,
        settings,
        tokenizer=args.tokenizer,
        heldout=args.held_out,
        quiet=args.quiet,
        fields=Fields(args.text_field, args.label_field, form),
    )
