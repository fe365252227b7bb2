"""Proves on the user's own weights that JAX computes what PyTorch does: the command `verify`.

Without further flags PyTorch and JAX run side by side, block by block (`live`). `--dump` and
`--against` exchange losses with any framework as a file (`exchange`). `--plan` replays an audit's
probes and compares losses, votes and scores with those that a PyTorch script saved (`plan`).
PyTorch is imported only when it runs (`torch_reference`).
"""

import argparse
from pathlib import Path

from sama_jax.errors import UsageError
from sama_jax.storage.files import require_free


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `verify`."""
    parser.add_argument(
        "src", type=Path, metavar="SRC", help="model folder; with --plan the target"
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="DIR",
        action="append",
        default=[],
        help="LoRA adapter of SRC; repeatable, in their order",
    )
    exchange = parser.add_mutually_exclusive_group()
    exchange.add_argument("--against", type=Path, metavar="F.npz", help="losses made elsewhere")
    exchange.add_argument("--dump", type=Path, metavar="F.npz", help="write our losses")
    exchange.add_argument("--plan", type=Path, metavar="F.npz", help="replay an audit's probes")
    parser.add_argument("--losses", type=Path, metavar="F.npz", help="made elsewhere, for --plan")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="reference model, for --plan")
    parser.add_argument("--texts", type=Path, metavar="F", help="instead of the built-in text")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="auto: float32; without further flags the stored dtype, too",
    )
    parser.add_argument("--mask-id", type=int, help="replaces the mask token id of config.json")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the folder's own Python code as the PyTorch side; no other command can",
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0 if both sides agree (or a file was written), 6 if not. Raises `SamaError`."""
    plan_only = [f"--{n}" for n in ("losses", "reference") if getattr(args, n)]
    if plan_only and not args.plan:
        raise UsageError(f"{' and '.join(plan_only)} only make sense with --plan F.npz")
    if args.plan and not (args.losses and args.reference):
        raise UsageError("--plan needs --losses F.npz and --reference DIR, too (docs/verify.md)")
    if args.trust_remote_code and (args.dump or args.against or args.plan):
        raise UsageError("--trust-remote-code only makes sense where PyTorch runs: leave it away")

    require_free(args.dump, frozenset({"ids", "mask", "nll"}))
    import jax

    from checkpoints_convert.verify import exchange, live, plan
    from checkpoints_convert.verify.ours import open_ours

    dtype = "float32" if args.dtype == "auto" else args.dtype
    options = live.Options(
        args.dtype, args.adapter, args.mask_id, args.texts, args.trust_remote_code
    )
    with jax.default_matmul_precision("highest"):
        if args.plan:
            return plan.verify_plan(
                args.src, args.reference, args.plan, args.losses, dtype, options
            )
        if not (args.dump or args.against):
            return live.verify_live(args.src, options)
        ours = open_ours(args.src, dtype=dtype, adapters=args.adapter, mask_id=args.mask_id)
        if args.against:
            return exchange.compare_losses(args.against, ours)
        inputs = live.make_inputs(ours.folder, args.texts)
        exchange.write_losses(args.dump, ours, inputs.tokens, inputs.masks, inputs.valid)
        print(f"{args.dump}: {int(inputs.masks.sum())} masked of {int(inputs.valid.sum())} tokens")
    return 0
