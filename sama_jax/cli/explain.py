"""`sama-jax explain`: which tokens of a text give it away?"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sama_jax.cli import audit, flags
from sama_jax.cli.running import command_of

if TYPE_CHECKING:
    from sama_jax.texts.read import Text


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    p = command_of(
        commands, "explain", "Which tokens of a text give it away, from stored losses.", run
    )
    p.add_argument("run_folder", type=Path, metavar="DIR", help="an audit's --out")
    p.add_argument("--id", action="append", default=[], help="of a text or a document, repeatable")
    p.add_argument(
        "--top", type=int, default=5, metavar="N", help="else those of the largest scores (5)"
    )
    p.add_argument(
        "--data", type=Path, metavar="F", help="the texts (default: the files of the audit)"
    )
    flags.add_text_fields(p)
    flags.add_conversations(p)
    p.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="model folder (default: the target)"
    )
    p.add_argument("--html", type=Path, metavar="F", help="write a page instead; it holds texts")


def run(args: argparse.Namespace) -> None:
    """Prints the texts in colour, or writes the page."""
    flags.at_least_one(args, "top")
    from sama_jax.programs.explain import explain
    from sama_jax.reporting import tokens
    from sama_jax.reporting.report import read_finished
    from sama_jax.reporting.results import headline, metrics_of
    from sama_jax.storage.files import write_atomic
    from sama_jax.terminal import results_console

    said = headline(metrics_of(*read_finished(args.run_folder)))
    tokens.require_page(args.html)
    chosen = {"ids": args.id, "top": args.top, "tokenizer": args.tokenizer}
    found = explain(args.run_folder, _texts(args), **chosen)
    if args.html is None:
        print(said)
        results_console().print(tokens.terminal(found))
    else:
        write_atomic(args.html, tokens.page(found, said), private=True)
        print(f"{args.html} holds texts: keep it as private as they are")


def _texts(args: argparse.Namespace) -> "list[Text]":
    """Reads the texts of --data, else those of the audit's own flags, its control among them."""
    from sama_jax.programs.forms import form_of
    from sama_jax.texts.read import read_texts, with_control

    given = args if args.data else audit.flags_of_run(args.run_folder)
    folder = args.tokenizer or (None if args.data else given.target or given.reference[0])
    adapters = getattr(given, "adapter", None) or ()
    form = form_of(given.template, given.loss_on, given.end_tokens, folder, adapters)
    control, named = getattr(given, "control", None), (given.text_field, given.label_field)
    known = control and read_texts(control, *named, labels_needed=False, form=form)
    return with_control(audit.texts_of(given, form), known).texts
