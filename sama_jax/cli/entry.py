"""The `sama-jax` command line: parse, call, print. No logic, and no JAX before it is needed."""

import argparse
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sama_jax import __version__, config
from sama_jax.devices import processes
from sama_jax.errors import Interrupted, OutOfMemory, SamaError, UsageError

STANDARD = "sama,loss,loss:sum,zlib,ratio"
"""The attacks of an audit unless told otherwise: three plans' worth of passes."""

EXIT_CODES = """\
exit codes:
  0   done
  2   usage, settings, or an output folder of another run
  3   data
  4   model
  5   finished, but a validity gate failed under --strict
  6   parity failed
  71  out of memory, of a device or the host
  74  disk full or not writable
  75  interrupted (Ctrl-C, SIGTERM, another process is lost); the same command continues
"""


class Parser(argparse.ArgumentParser):
    """Ends with one line and exit code 2 on wrong flags."""

    def error(self, message: str) -> NoReturn:
        """One line and exit code 2, like every other usage error."""
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(UsageError.exit_code)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(
        prog="sama-jax",
        description="Membership-inference audits of fine-tuned diffusion language models.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sama-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_audit(commands)
    _add_finetune(commands)
    _add_pretrain(commands)
    _add_attacks(commands)
    _add_bench(commands)
    _add_score(commands)
    _add_merge(commands)
    _add_nll(commands)
    _add_plan(commands)
    _add_experiment(commands)
    _add_report(commands)
    return parser


def _command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_demo(commands: Any) -> None:
    p = _command(commands, "demo", "A whole audit on a small model, made here, in minutes.")
    p.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    p.add_argument("--seed", type=int, default=42, help="of the split and of training")
    p.add_argument("--fresh", action="store_true", help="remove DIR and start over")
    p.add_argument("--quiet", action="store_true")


def _add_audit(commands: Any) -> None:
    p = _command(commands, "audit", "Which of these texts was the target fine-tuned on?")
    p.add_argument("--target", type=Path, metavar="DIR", help="fine-tuned model")
    p.add_argument("--reference", type=Path, required=True, metavar="DIR", help="its base model")
    p.add_argument(
        "--adapter", type=Path, metavar="DIR", help="LoRA adapter for --target (default: reference)"
    )
    p.add_argument("--data", type=Path, metavar="F", help="texts with optional labels")
    p.add_argument("--members", type=Path, metavar="F", help="or: texts that were trained on")
    p.add_argument("--nonmembers", type=Path, metavar="F", help="and texts that were not")
    p.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="results, or a run to continue"
    )
    p.add_argument("--attacks", default=STANDARD, metavar="a,b|all", help=f"default: {STANDARD}")
    p.add_argument("--prefixes", type=Path, metavar="F", help="texts for ReCaLL's prefixes")
    p.add_argument("--preset", default="default", help=", ".join(config.PRESETS))
    p.add_argument("--passes", type=int, metavar="Q", help="forward passes of every attack")
    p.add_argument(
        "--max-length",
        type=int,
        default=512,
        metavar="TOKENS",
        help="texts are cut there (default: 512)",
    )
    p.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="auto: float32 on CPUs, else as stored",
    )
    p.add_argument(
        "--padding",
        default="hidden",
        choices=["hidden", "visible"],
        help="visible: reproduce set-ups that attend to it",
    )
    p.add_argument(
        "--pad-to", type=int, default=0, metavar="TOKENS", help="length of visible padding"
    )
    p.add_argument("--seed", type=int, default=42, help="of masks and subsets")
    p.add_argument(
        "--batch-size",
        type=int,
        metavar="ROWS",
        help="texts a device works on at once (default: by their length, and as many as fit)",
    )
    _add_devices(p)
    p.add_argument("--mask-id", type=int, help="replaces the mask token id of config.json")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N texts")
    p.add_argument(
        "--dry-run", action="store_true", help="check the inputs, print the estimate, write nothing"
    )
    p.add_argument("--plan", type=Path, metavar="F", help="replay the probes of a plan file")
    p.add_argument("--save-plan", type=Path, metavar="F", help="write SAMA's probes for a replay")
    p.add_argument("--save-losses", type=Path, metavar="F", help="write SAMA's losses (npz)")
    p.add_argument("--store", type=Path, metavar="DIR", help="loss store (default: OUT/losses)")
    p.add_argument("--strict", action="store_true", help="exit 5 if a validity gate fails")
    p.add_argument("--include-text", action="store_true", help="copy texts into the results")
    p.add_argument("--include-votes", action="store_true", help="step votes and tie rates, too")
    p.add_argument("--no-figures", action="store_true", help="a report without pictures")
    _add_compile_cache(p)
    p.add_argument("--quiet", action="store_true", help="no progress, no table")
    _add_set(p)


def _add_devices(p: argparse.ArgumentParser) -> None:
    p.add_argument("--parallel", default="auto", choices=["auto", "pmap", "sharded"],
                   help="models whole on every device, or split over a mesh")  # fmt: skip
    p.add_argument("--mesh", metavar="data=N,model=M", help="rows over N devices, models over M")
    p.add_argument("--fully-sharded", action="store_true", help="split parameters over data, too")
    p.add_argument("--models", default="auto", choices=["auto", "together", "in-turn"],
                   help="both in memory, or all of the target's passes first")  # fmt: skip
    p.add_argument("--coordinator", metavar="HOST:PORT", help="several processes: process 0's")
    p.add_argument("--num-processes", type=int, metavar="N")
    p.add_argument("--process-id", type=int, metavar="I")
    p.add_argument("--distributed", action="store_true", help="the same from Slurm or a TPU slice")
    p.add_argument("--start-timeout", type=float, default=processes.START_SECONDS, metavar="S",
                   help="seconds that processes wait for each other at the start")  # fmt: skip


def _add_training(p: argparse.ArgumentParser) -> None:
    defaults = config.TrainSettings()
    p.add_argument("--data", type=Path, required=True, metavar="FILE")
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.add_argument("--held-out", type=Path, metavar="FILE", help="texts for the NLL at the end")
    p.add_argument("--epochs", type=float, default=defaults.epochs)
    p.add_argument("--batch-size", type=int, default=defaults.batch_size)
    p.add_argument("--lr", type=float, default=defaults.learning_rate)
    p.add_argument("--max-length", type=int, default=defaults.max_length, metavar="TOKENS")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--seed", type=int, default=defaults.seed)
    p.add_argument("--train-on-padding", action="store_true", help="as the published trainer does")
    p.add_argument("--quiet", action="store_true")
    _add_set(p)


def _add_finetune(commands: Any) -> None:
    p = _command(commands, "finetune", "Fine-tune a model folder by its kind's own loss.")
    p.add_argument("--base", type=Path, required=True, metavar="DIR")
    _add_training(p)


def _add_pretrain(commands: Any) -> None:
    p = _command(commands, "pretrain", "Train a model from a config.json and a tokenizer.")
    p.add_argument("--config", type=Path, required=True, metavar="FILE")
    p.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: train one on the data")
    _add_training(p)


def _add_attacks(commands: Any) -> None:
    p = _command(commands, "attacks", "List the attacks: what each reads, its passes, its source.")
    p.add_argument("--attacks", default="all", metavar="a,b|all")
    p.add_argument("--preset", default="default", help=", ".join(config.PRESETS))
    p.add_argument("--passes", type=int, metavar="Q", help="forward passes of every attack")
    p.add_argument("--json", action="store_true")
    _add_set(p)


def _add_bench(commands: Any) -> None:
    p = _command(commands, "bench", "What scoring costs on this machine, and beside plain PyTorch.")
    p.add_argument("--model", type=Path, required=True, metavar="DIR")
    p.add_argument("--data", type=Path, required=True, metavar="F", help="texts")
    p.add_argument("--max-length", type=int, default=512, metavar="TOKENS")
    p.add_argument("--windows", action="store_true",
                   help="join the texts, cut them into pieces of --max-length tokens")  # fmt: skip
    p.add_argument("--limit", type=int, metavar="N", help="only the first N texts, or pieces")
    p.add_argument("--preset", default="official", help=", ".join(config.PRESETS))
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    p.add_argument("--batch-size", type=int, metavar="ROWS", help="texts a device works on at once")
    p.add_argument("--against", choices=["torch"], help="measure plain PyTorch in the same run")
    p.add_argument("--rounds", type=int, default=5, metavar="N", help="medians are reported")
    p.add_argument("--growth", action="store_true",
                   help="instead: cost by number of texts, length and passes")  # fmt: skip
    p.add_argument("--json", type=Path, metavar="F", help="write the results there, too")
    _add_compile_cache(p)
    p.add_argument("--quiet", action="store_true")
    _add_set(p)


def _add_score(commands: Any) -> None:
    p = _command(commands, "score", "Score more attacks from stored losses, without a model.")
    p.add_argument("--store", type=Path, required=True, metavar="DIR", help="an audit's --out")
    p.add_argument("--attacks", default="all", metavar="a,b|all")
    _add_compile_cache(p)
    p.add_argument("--quiet", action="store_true")


def _add_merge(commands: Any) -> None:
    p = _command(commands, "merge", "Join the parts of an audit whose hosts share no disk.")
    p.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    p.add_argument("parts", type=Path, nargs="+", metavar="PART_DIR", help="the hosts' --out")
    p.add_argument("--quiet", action="store_true")


def _add_nll(commands: Any) -> None:
    p = _command(commands, "nll", "Likelihood bound of texts, with its standard error.")
    p.add_argument("--model", type=Path, required=True, metavar="DIR")
    p.add_argument("--data", type=Path, required=True, metavar="F")
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.add_argument("--passes", type=int, default=128, metavar="Q", help="default: LLaDA's 128")
    p.add_argument("--max-length", type=int, default=512, metavar="TOKENS")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    p.add_argument("--seed", type=int, default=42)
    p.add_argument("--mask-id", type=int, help="replaces the mask token id of config.json")
    _add_compile_cache(p)
    p.add_argument("--quiet", action="store_true")
    _add_set(p)


def _add_plan(commands: Any) -> None:
    p = _command(
        commands, "plan", "Memory and time of an audit on TPUs that you need not have, or on CPUs."
    )
    p.add_argument(
        "--model", type=Path, required=True, metavar="DIR|FILE", help="model folder or config.json"
    )
    p.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="such as v5e:4x4, v6e:2x4, v5p:2x2x2, v4:2x2x4; cpu:8 for 8 simulated CPU devices",
    )
    p.add_argument(
        "--mesh",
        metavar="data=N,model=M",
        help="default: the fewest parts of the model that fit",
    )
    p.add_argument("--rows", type=int, metavar="N", help="texts at once on each group of M chips")
    p.add_argument("--max-length", type=int, default=512, metavar="TOKENS")
    p.add_argument("--attacks", default=STANDARD, metavar="a,b|all", help=f"default: {STANDARD}")
    p.add_argument("--preset", default="default", help=", ".join(config.PRESETS))
    p.add_argument("--passes", type=int, metavar="Q", help="forward passes of every attack")
    p.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="auto: bfloat16",
    )
    p.add_argument(
        "--models",
        default="together",
        choices=["together", "in-turn"],
        help="both in memory, or one after the other",
    )
    p.add_argument("--texts", type=int, default=1000, metavar="N", help="default: 1000")
    p.add_argument(
        "--utilisation",
        type=float,
        default=0.4,
        metavar="U",
        help="share of the chips' peak that is reached, for the time (default: 0.4)",
    )
    p.add_argument("--json", type=Path, metavar="F", help="write everything as JSON, too")
    p.add_argument("--quiet", action="store_true", help="no progress")
    _add_set(p)


def _add_experiment(commands: Any) -> None:
    p = _command(commands, "experiment", "Run an experiment of experiments/, or list them.")
    p.add_argument("name", nargs="?", metavar="NAME|FILE", help="left out: list them")
    p.add_argument(
        "--out",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="results go to DIR/NAME, the demo's models to DIR/demo (default: runs)",
    )
    p.add_argument("--quiet", action="store_true")


def _add_report(commands: Any) -> None:
    p = _command(commands, "report", "Write report.md and the figures of a run folder again.")
    p.add_argument("run", type=Path, metavar="DIR")


def _add_compile_cache(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--compile-cache",
        type=Path,
        metavar="DIR",
        help="keep compiled programs there (default: JAX_COMPILATION_CACHE_DIR)",
    )


def _add_set(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="any setting, repeatable"
    )


# --- commands ------------------------------------------------------------------------------------


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _audit(args: argparse.Namespace) -> int | None:
    for name in ("limit", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    if args.target is None and args.adapter is None:
        raise UsageError("give --target DIR, or --adapter DIR with its base as --reference")
    settings = config.AuditSettings(
        preset=args.preset,
        sama=config.preset(args.preset),
        max_length=args.max_length,
        seed=args.seed,
        dtype=args.dtype,
        padding=args.padding,
        pad_to=args.pad_to,
    )
    overrides = [*config.budget_overrides(settings, args.passes), *args.set]
    if any(a.partition("=")[0].strip() == "preset" for a in overrides):
        raise UsageError("setting preset is a name only; choose one with --preset")
    settings = config.override(settings, overrides)
    place = processes.given_place(args.coordinator, args.num_processes, args.process_id)
    if place is None and args.distributed:
        place = processes.found_place(os.environ)
    peers = processes.join()
    if peers is None and place is not None and place.count > 1 and not args.dry_run:
        command = [sys.executable, "-m", "sama_jax", *args.argv]
        kept = (
            "finished batches are kept: the same command, with any number of processes, continues"
        )
        return processes.supervise(command, place, args.start_timeout, kept)

    from sama_jax import attacks
    from sama_jax.devices import parallel
    from sama_jax.devices.compile_cache import use_compile_cache
    from sama_jax.programs.audit import AuditJob, run_audit
    from sama_jax.texts import data

    use_compile_cache(args.compile_cache)
    if peers is not None:
        parallel.connect(peers.jax_address, peers.count, peers.rank)

    wanted = _names(args.attacks)
    attacks.select(wanted)
    if args.data and not (args.members or args.nonmembers):
        texts = data.read_texts(args.data)
    elif args.members and args.nonmembers and not args.data:
        texts = data.read_split(args.members, args.nonmembers)
    else:
        raise UsageError("give either --data F, or --members F and --nonmembers F")
    job = AuditJob(
        target=args.target or args.reference,
        adapter=args.adapter,
        reference=args.reference,
        texts=texts,
        out=args.out,
        attacks=wanted,
        settings=settings,
        limit=args.limit,
        batch_size=args.batch_size,
        parallel=args.parallel,
        mesh=args.mesh,
        fully_sharded=args.fully_sharded,
        models=args.models,
        mask_id=args.mask_id,
        prefixes=data.read_texts(args.prefixes) if args.prefixes else None,
        store=args.store,
        plan=args.plan,
        save_plan=args.save_plan,
        save_losses=args.save_losses,
        include_text=args.include_text,
        include_votes=args.include_votes,
        strict=args.strict,
        dry_run=args.dry_run,
        figures=not args.no_figures,
        quiet=args.quiet,
        command=args.command_line,
        peers=peers or processes.Peers(),
    )
    result = run_audit(job)
    if result is not None and not args.quiet:
        _print_result(result)


def _print_result(result: Any) -> None:
    """The table on standard output; where the rest is on standard error."""
    from rich.console import Console

    from sama_jax.reporting.results import headline
    from sama_jax.reporting.tables import metrics_table

    Console().print(metrics_table(result.metrics, result.rows, result.cost))
    print(headline(result.metrics))
    print(f"results: {result.out} (report.md, scores.jsonl, metrics.json)", file=sys.stderr)


def _train_settings(args: argparse.Namespace, **more: Any) -> config.TrainSettings:
    settings = config.TrainSettings(
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.lr,
        max_length=args.max_length,
        dtype=args.dtype,
        seed=args.seed,
        train_on_padding=args.train_on_padding,
        **more,
    )
    return config.override(settings, args.set)


def _finetune(args: argparse.Namespace) -> None:
    settings = _train_settings(args)
    from sama_jax.training.finetune import finetune

    finetune(args.base, args.data, args.out, settings, heldout=args.held_out, quiet=args.quiet)


def _pretrain(args: argparse.Namespace) -> None:
    settings = _train_settings(args, windows=True)
    from sama_jax.training.finetune import pretrain

    pretrain(
        args.config,
        args.data,
        args.out,
        settings,
        tokenizer=args.tokenizer,
        heldout=args.held_out,
        quiet=args.quiet,
    )


def _attacks(args: argparse.Namespace) -> None:
    settings = config.AuditSettings(preset=args.preset, sama=config.preset(args.preset))
    overrides = [*config.budget_overrides(settings, args.passes), *args.set]
    settings = config.override(settings, overrides)
    from sama_jax.programs import catalogue

    found = catalogue.describe(_names(args.attacks), settings)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        catalogue.print_table(found)


def _bench(args: argparse.Namespace) -> None:
    for name in ("limit", "batch_size", "rounds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    settings = config.AuditSettings(
        preset=args.preset,
        sama=config.preset(args.preset),
        max_length=args.max_length,
        dtype=args.dtype,
    )
    settings = config.override(settings, args.set)
    from sama_jax.programs.bench.growth import run_growth
    from sama_jax.programs.bench.run import run_bench
    from sama_jax.programs.bench.table import print_growth, print_table
    from sama_jax.programs.jobs import BenchJob
    from sama_jax.storage.files import write_json
    from sama_jax.texts import data

    job = BenchJob(
        model=args.model,
        texts=data.read_texts(args.data).texts,
        settings=settings,
        windows=args.windows,
        limit=args.limit,
        batch_size=args.batch_size,
        torch=args.against == "torch",
        rounds=args.rounds,
        compile_cache=args.compile_cache,
        quiet=args.quiet,
    )
    run, show = (run_growth, print_growth) if args.growth else (run_bench, print_table)
    found: Any = run(job)
    if args.json:
        write_json(args.json, found)
    show(found)


def _score(args: argparse.Namespace) -> None:
    from sama_jax.devices.compile_cache import use_compile_cache
    from sama_jax.programs.rescore import run_score

    use_compile_cache(args.compile_cache)
    result = run_score(args.store, _names(args.attacks), quiet=args.quiet)
    if not args.quiet:
        _print_result(result)


def _merge(args: argparse.Namespace) -> None:
    from sama_jax.programs.merge import run_merge

    result = run_merge(args.out, args.parts, quiet=args.quiet)
    if not args.quiet:
        _print_result(result)


def _nll(args: argparse.Namespace) -> None:
    if args.passes < 2:
        raise UsageError("--passes must be at least 2: one pass has no standard error")
    settings = config.AuditSettings(max_length=args.max_length, dtype=args.dtype, seed=args.seed)
    settings = config.override(settings, [f"likelihood.passes={args.passes}", *args.set])
    from sama_jax.devices.compile_cache import use_compile_cache
    from sama_jax.programs.nll import RESULT, run_nll
    from sama_jax.texts import data

    use_compile_cache(args.compile_cache)
    texts = data.read_texts(args.data)
    rows = run_nll(args.model, texts, args.out, settings, mask_id=args.mask_id, quiet=args.quiet)
    known = [row for row in rows if row["nll"] is not None]
    if known and not args.quiet:
        mean = sum(row["nll"] for row in known) / len(known)
        print(f"{len(known)} texts, {mean:.4f} nats a token on average: {args.out / RESULT}")


def _plan(args: argparse.Namespace) -> None:
    for name in ("texts", "max_length"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 < args.utilisation <= 1:
        raise UsageError(f"--utilisation must lie between 0 and 1, got {args.utilisation}")
    settings = config.AuditSettings(
        preset=args.preset,
        sama=config.preset(args.preset),
        max_length=args.max_length,
        dtype=args.dtype,
    )
    overrides = [*config.budget_overrides(settings, args.passes), *args.set]
    settings = config.override(settings, overrides)
    from sama_jax.programs import capacity
    from sama_jax.storage.files import write_json

    job = capacity.PlanJob(
        model=args.model,
        topology=args.topology,
        mesh=args.mesh,
        rows=args.rows,
        settings=settings,
        attacks=_names(args.attacks),
        texts=args.texts,
        utilisation=args.utilisation,
        models=2 if args.models == "together" else 1,
        quiet=args.quiet,
    )
    found = capacity.run_plan(job)
    print("\n".join(capacity.lines(found)))
    if args.json:
        write_json(args.json, found)


def _experiment(args: argparse.Namespace) -> None:
    from sama_jax.programs import experiment

    if args.name is None:
        for name, summary in experiment.available().items():
            print(f"{name}: {summary}")
    else:
        experiment.run_experiment(args.name, args.out, quiet=args.quiet)


def _report(args: argparse.Namespace) -> None:
    from sama_jax.reporting import report

    print(report.write_report(args.run))


def _demo(args: argparse.Namespace) -> None:
    from sama_jax.programs.demo import run_demo

    run_demo(
        args.out, seed=args.seed, fresh=args.fresh, quiet=args.quiet, command=args.command_line
    )


_COMMANDS = {
    "attacks": _attacks,
    "audit": _audit,
    "bench": _bench,
    "demo": _demo,
    "experiment": _experiment,
    "finetune": _finetune,
    "merge": _merge,
    "nll": _nll,
    "plan": _plan,
    "pretrain": _pretrain,
    "report": _report,
    "score": _score,
}


def _end_on_signals(line: str) -> None:
    """Ctrl-C and SIGTERM end the process at once, with one line.

    What is finished is in its files at any moment, so nothing is left to put in order, while an
    exception would come up wherever it strikes: in an import, a destructor, a callback of XLA.
    Training has handlers of its own, which save a last checkpoint.
    """

    said: list[bool] = []

    def end(*_: object) -> None:
        if said:  # a second signal while the line of the first is written
            return
        said.append(True)
        cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # a progress bar hides it
        os.write(2, f"{cursor}{line}\n".encode())
        os._exit(Interrupted.exit_code)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit code; errors are one line on stderr."""
    given = sys.argv[1:] if argv is None else argv
    goes_on = not set(given[:1]) & {"bench", "plan"}
    line = "what is finished is kept: {command} continues" if goes_on else "{command} starts over"
    code = run_program("sama-jax", build_parser(), _COMMANDS, argv, line)
    processes.leave(code)
    return code


def run_program(
    program: str,
    parser: argparse.ArgumentParser,
    commands: Mapping[str, Callable[[argparse.Namespace], int | None]],
    argv: Sequence[str] | None,
    interrupted: str = "what is finished is kept: {command} continues",
) -> int:
    """Parses, runs one of `commands`, turns errors into one line; returns the exit code.

    Without `argv` it owns the process: signals are caught, and after one nothing runs any more.
    """
    name = program.split()[-1]
    command = f"{program} {shlex.join(sys.argv[1:] if argv is None else argv)}"
    interrupted = f"interrupted; {interrupted.format(command=command)}"
    if argv is None:
        _end_on_signals(f"{name}: {interrupted}")
    args = parser.parse_args(argv)
    args.command_line, args.argv = command, sys.argv[1:] if argv is None else list(argv)
    try:
        return commands[args.command](args) or 0
    except (Interrupted, KeyboardInterrupt) as error:
        text = str(error) or interrupted
        print(f"{name}: {text}", file=sys.stderr, flush=True)
        if argv is None:
            os._exit(Interrupted.exit_code)
        return Interrupted.exit_code
    except SamaError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        reason = _allocation(error)
        if reason is None:
            raise
        print(f"{name}: out of memory ({reason}); {_smaller(args)}", file=sys.stderr)
        return OutOfMemory.exit_code


def _allocation(error: Exception) -> str | None:
    """What an allocation that failed says, in one line; None of any other error.

    JAX's own class is not imported here. Where XLA tries kernels out, its first line is another.
    """
    if isinstance(error, MemoryError):
        return str(error) or "MemoryError"
    found = re.search(r"RESOURCE_EXHAUSTED[^\n]*", str(error))
    return found and found[0]


def _smaller(args: argparse.Namespace) -> str:
    """What needs less memory, by the flags that the command has."""
    advice = {
        "batch_size": "a smaller --batch-size",
        "max_length": "a smaller --max-length",
        "models": "--models in-turn",
        "mesh": "--mesh data=1,model=N over N devices",
        "dtype": "--dtype bfloat16",
    }
    found = [text for flag, text in advice.items() if hasattr(args, flag)]
    return f"what needs less: {', '.join(found)}" if found else "it needs a machine with more"


if __name__ == "__main__":
    sys.exit(main())
