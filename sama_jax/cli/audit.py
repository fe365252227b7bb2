"""`sama-jax audit`: which of these texts was the target fine-tuned on?"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sama_jax.cli import flags
from sama_jax.cli.config_file import add_config, given_flags, save_config
from sama_jax.cli.results import print_result
from sama_jax.cli.running import Parser, command_of
from sama_jax.config import AuditSettings
from sama_jax.devices import processes, secret
from sama_jax.devices.rank import found_place, given_place
from sama_jax.errors import UsageError
from sama_jax.programs.jobs import AuditJob

if TYPE_CHECKING:
    from sama_jax.texts.conversations import Form
    from sama_jax.texts.read import Texts

NONE = Path("none")
"""What `--reference` takes for "there is none"; a folder of that name needs its whole path."""


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    add_flags(
        command_of(commands, "audit", "Which of these texts was the target fine-tuned on?", run)
    )


def add_flags(p: Parser) -> None:
    """Adds the flags alone."""
    _add_inputs(p.add_argument_group("models and texts"))

    attacks = p.add_argument_group("attacks")
    attacks.add_argument(
        "--attacks",
        type=flags.names,
        metavar="a,b|all",
        help=f"names, or all (default: {flags.STANDARD}; without a reference {flags.ALONE})",
    )
    flags.flags_of(attacks, AuditJob, "primary", "margin")
    attacks.add_argument(
        "--family",
        type=flags.names,
        default=(),
        metavar="a,b",
        help="attacks that are declared besides, at most 8 in all (default: the usual ones)",
    )
    flags.add_budget(attacks)
    attacks.add_argument("--prefixes", type=Path, metavar="F", help="texts for ReCaLL's prefixes")
    flags.flags_of(attacks, AuditSettings, "max_length", "seed", "dtype", "padding", "pad_to")
    flags.flags_of(attacks, AuditJob, "second_seed", "plan")
    flags.add_set(attacks)

    devices = p.add_argument_group("devices")
    flags.flags_of(devices, AuditJob, "batch_size", "parallel", "mesh", "fully_sharded", "models")
    flags.add_compile_cache(devices)

    several = p.add_argument_group("several processes")
    _add_processes(several)

    outputs = p.add_argument_group("outputs")
    flags.flags_of(
        outputs,
        AuditJob,
        "out",
        "store",
        "save_plan",
        "save_losses",
        "include_text",
        "include_votes",
        "figures",
        "strict",
        "dry_run",
        "quiet",
    )
    add_config(outputs)
    p.set_defaults(parser=p)


def _add_inputs(inputs: flags.Flags) -> None:
    flags.flags_of(inputs, AuditJob, "target", required=False)
    flags.flags_of(inputs, AuditJob, "reference", action="append")
    flags.flags_of(inputs, AuditJob, "reference_tokenizer")
    flags.flags_of(inputs, AuditJob, "adapter", action="append")
    inputs.add_argument("--data", type=Path, metavar="F", help="texts with optional labels")
    inputs.add_argument("--members", type=Path, metavar="F", help="or: texts that were trained on")
    inputs.add_argument("--nonmembers", type=Path, metavar="F", help="and texts that were not")
    inputs.add_argument(
        "--control",
        type=Path,
        metavar="F",
        help="known members besides, which must be found: at least 7 different texts",
    )
    flags.add_text_fields(inputs)
    flags.add_conversations(inputs)
    flags.flags_of(inputs, AuditJob, "pipeline_control", "split", "limit", "mask_id")
    flags.flags_of(inputs, AuditJob, "attention_mask", "reference_attention_mask")
    flags.flags_of(inputs, AuditJob, "windows", "stride", "top_windows")


def _add_processes(p: flags.Flags) -> None:
    p.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is met")
    p.add_argument("--num-processes", type=int, metavar="N")
    p.add_argument("--process-id", type=int, metavar="I", help="from 0 to N - 1")
    p.add_argument("--distributed", action="store_true", help="the same from Slurm or a TPU slice")
    p.add_argument(
        "--start-timeout",
        type=flags.positive,
        default=processes.START_SECONDS,
        metavar="S",
        help="seconds that processes wait for each other at the start (default: %(default)s)",
    )
    p.add_argument(
        "--stall-timeout",
        type=flags.positive,
        default=processes.STALL_SECONDS,
        metavar="S",
        help="seconds without progress until a process counts as lost (default: %(default)s)",
    )
    p.add_argument(
        "--secret-file",
        type=Path,
        metavar="F",
        help="the secret of the processes, made if it is not there (default: SAMA_JAX_SECRET, "
        f"else {secret.DEFAULT})",
    )


def run(args: argparse.Namespace) -> int | None:
    """Runs the audit, or supervises a child process that does."""
    settings = checked(args)
    save_config(args.save_config, "audit", args.flags)
    here = given_place(args.coordinator, args.num_processes, args.process_id)
    if here is None and args.distributed:
        here = found_place(os.environ)
    peers = processes.join()
    if peers is None and here is not None and here.count > 1 and not args.dry_run:
        bounds = processes.Bounds(args.start_timeout, args.stall_timeout)
        kept = (
            "finished batches are kept: the same command, with any number of processes, continues"
        )
        shared = secret.find_secret(args.secret_file, os.environ)
        command = ["-m", "sama_jax", *args.argv]
        return processes.supervise(command, here, bounds, kept, shared)
    from sama_jax.programs.audit import run_audit

    result = run_audit(job_of(args, settings, peers))
    if result is not None and not args.quiet:
        print_result(result)
    return None


def checked(args: argparse.Namespace) -> AuditSettings:
    """Returns the settings of an audit; its flags stand in `args.flags` afterwards.

    Raises `UsageError` for flags that do not go together.
    """
    flags.at_least_one(args, "limit", "batch_size", "stride", "top_windows")
    settings = flags.settings_of(args, AuditSettings)
    args.flags = given_flags(args.parser, args)
    if args.reference == [NONE]:  # whatever a folder of that name may hold
        args.flags["reference"] = str(NONE)
    args.reference = _references(args.reference or [])
    if args.attacks is None:
        args.attacks = flags.names(flags.STANDARD if args.reference else flags.ALONE)
    if args.target is None and (args.adapter is None or len(args.reference) != 1):
        raise UsageError("give --target DIR, or --adapter DIR with its base as --reference")
    files = tuple(map(bool, (args.data, args.members, args.nonmembers)))
    if files not in ((True, False, False), (False, True, True)):
        raise UsageError("give either --data F, or --members F and --nonmembers F")
    return settings


def _references(given: list[Path]) -> list[Path]:
    """Returns the references; `none` stands for none of them. Raises `UsageError`."""
    if NONE not in given:
        return given
    if len(given) > 1:
        raise UsageError("--reference none says that there is no reference: leave the others out")
    return []


def job_of(
    args: argparse.Namespace, settings: AuditSettings, peers: processes.Peers | None = None
) -> AuditJob:
    """Makes the job of the flags: reads the texts, and meets the other processes."""
    from sama_jax import attacks
    from sama_jax.devices import mesh
    from sama_jax.programs.forms import form_of
    from sama_jax.texts.read import read_texts

    if peers is not None and peers.jax is not None:
        mesh.connect(*peers.jax, peers.count, peers.rank)
    attacks.select(args.attacks)  # names that are wrong, before long files are read
    target = args.target or args.reference[0]
    form = form_of(args.template, args.loss_on, args.end_tokens, target, args.adapter or ())
    named = (args.text_field, args.label_field)
    read = texts_of(args, form)
    others = {
        name: path and read_texts(path, *named, labels_needed=False, form=form)
        for name, path in (("prefixes", args.prefixes), ("control", args.control))
    }
    given = {
        "target": target,
        "texts": read,
        **others,
        "settings": settings,
        "peers": peers or processes.Peers(),
    }
    return AuditJob(**(flags.values_of(args, AuditJob) | given))


def texts_of(args: argparse.Namespace, form: "Form | None") -> "Texts":
    """Reads the texts that an audit's flags name, but for those of its control."""
    from sama_jax.texts.read import read_split, read_texts

    named = (args.text_field, args.label_field)
    if args.data:
        return read_texts(args.data, *named, form=form)
    return read_split(args.members, args.nonmembers, *named, form=form)


def flags_of_run(folder: Path) -> argparse.Namespace:
    """Returns the flags that a run was made with. Raises `UsageError` if its folder has none."""
    from sama_jax.storage.run_folder import CONFIG

    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder}: does not say which texts it read ({CONFIG}); give --data F")
    parser = Parser(prog="sama-jax audit")
    add_flags(parser)
    return parser.parse_args([f"--config={folder / CONFIG}", "--out", str(folder)])
