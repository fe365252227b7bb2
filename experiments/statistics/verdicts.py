"""Counts how often `verify` finds a fault, and names its stage, in a folder that you have.

    python experiments/statistics/verdicts.py DIR [--faults noise,heads,theta,norm] [--tries N]

PyTorch reads DIR, JAX a copy with one fault: `noise` of 1e-2 of their spread on the weights of one
block; two query `heads` of one block swapped; a rotary `theta` of a tenth, two tenths, .. of the
right one; one layer `norm` off by 1e-3. Each try has a block of its own. Prints Markdown: of each
fault how many tries end in DIFFERENT, at the right stage, and in the noise of PyTorch the error
there and the largest one before. An eighth of a minute a try for 135M parameters on two CPU cores.
"""

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from checkpoints_convert.verify import compare, inputs, ours
from sama_jax.programs.bench import torch_reference
from sama_jax.weights.model_folder import ModelFolder, open_folder

FAULTS = ("noise", "heads", "theta", "norm")
Tensors = dict[str, np.ndarray]
_BLOCK = re.compile(r"(?:layers|layer|blocks)\.(\d+)\.")
_NORM = re.compile(r"norm", re.IGNORECASE)
_QUERIES = re.compile(r"\.(?:q_proj|query|Wqkv|att_proj)\.weight$")


def faulty(
    tensors: Tensors, config: dict, folder: ModelFolder, fault: str, seed: int
) -> tuple[str, Tensors, dict]:
    """Returns the stage that has the fault, and tensors and config with it."""
    rng, layers = np.random.default_rng(seed), folder.model.num_layers
    block = int(np.random.default_rng(1).permutation(layers)[seed % layers])
    mine = {n: x for n, x in tensors.items() if (m := _BLOCK.search(n)) and int(m[1]) == block}
    stage, changed = f"block {block + 1}", {}
    if fault == "theta":
        return "block 1", tensors, _slower(config, min(0.99, (seed + 1) / 10))
    if fault == "noise":
        for name, x in mine.items():
            if x.ndim > 1:
                spread = np.float32(1e-2 * x.std())
                changed[name] = x + spread * rng.standard_normal(x.shape, np.float32)
    elif fault == "heads":
        (name,) = (n for n in mine if _QUERIES.search(n))
        size = folder.model.arch.head_size
        rows = mine[name].copy().reshape(-1, size, mine[name].shape[1])
        a, b = rng.choice(folder.model.arch.num_heads, 2, replace=False)
        rows[[a, b]] = rows[[b, a]]
        changed[name] = rows.reshape(mine[name].shape)
    else:
        name = rng.choice(sorted(n for n in mine if _NORM.search(n) and n.endswith("weight")))
        changed[name] = mine[name] * np.float32(1 + 1e-3)
    return stage, tensors | changed, config


def _slower(config: dict, share: float) -> dict:
    """Returns a config whose rotary base is a share of what it was."""
    nested = config.get("rope_parameters") or {}
    if "rope_theta" in nested:
        return {**config, "rope_parameters": {**nested, "rope_theta": share * nested["rope_theta"]}}
    return {**config, "rope_theta": share * config.get("rope_theta", 10000.0)}


def tries(path: Path, faults: tuple[str, ...], times: int) -> Iterator[list[object]]:
    """Yields the fault, its stage, the stage that is named, and the noises there and before."""
    folder = open_folder(path, dtype="float32")
    texts = inputs.make_inputs(folder, None)
    wanted = torch_reference.Wanted(
        path,
        folder.config,
        folder.model.num_layers,
        folder.model.arch.block_length,
        "float32",
    )
    reference = torch_reference.open_reference(wanted)
    theirs = compare.run_theirs(reference, texts, folder.model.mask_id)
    del reference
    tensors = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text("utf-8"))
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copytree(path, Path(place) / "copy"))
        for fault in faults:
            for seed in range(times):
                stage, changed, words = faulty(tensors, config, folder, fault, seed)
                save_file(changed, copy / "model.safetensors", {"format": "pt"})
                (copy / "config.json").write_text(json.dumps(words))
                lines = list(compare.compare(ours.open_ours(copy, dtype="float32"), texts, theirs))
                named = next((x for x in lines if not x.agrees), None)
                at = next(i for i, x in enumerate(lines) if x.stage == stage)
                before = max(x.noises for x in lines[:at])
                yield [fault, stage, named.stage if named else "none", lines[at].noises, before]


def main() -> None:
    """Prints a row a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--tries", type=int, default=10)
    args = parser.parse_args()
    faults = tuple(args.faults.split(","))
    with jax.default_matmul_precision("highest"):
        found = list(tries(args.dir, faults, args.tries))
    print("| fault | tries | found | right stage | noises there | largest before |")
    print("| --- | --- | --- | --- | --- | --- |")
    for fault in faults:
        rows = [row[1:] for row in found if row[0] == fault]
        there = [float(row[2]) for row in rows]
        counts = [sum(row[1] != "none" for row in rows), sum(row[0] == row[1] for row in rows)]
        spread = f"{min(there):.3g} to {max(there):.3g}"
        before = max(float(row[3]) for row in rows)
        print(f"| {fault} | {len(rows)} | {counts[0]} | {counts[1]} | {spread} | {before:.2g} |")


if __name__ == "__main__":
    main()
