"""Compares the dequantisation of weights with that of the libraries that write them.

    python experiments/quantised_agreement.py [bitsandbytes gptq awq fp8 compressed]
    python experiments/quantised_agreement.py --fixtures tests/fixtures/quantised

Each library packs random weights and dequantises them; the same tensors are then read from a
safetensors file by this program. Printed are the versions, how many tensors were compared, the
share of values that differ in any bit, and the largest difference in units of the last place of
bfloat16. Needs torch and the library (bitsandbytes, auto-gptq, autoawq, transformers with
accelerate, compressed-tensors), on a CPU.
"""

import importlib.metadata
import importlib.util
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import save_file

from sama_jax.models.families.weight_table import Rule, Table
from sama_jax.weights import quantised, source

TABLE = Table(rule=lambda path, layers: Rule(path), hub_prefix="")
TINY = (32, 64)
"""Of the fixtures."""
SHAPES = (TINY, (96, 80), (512, 768))


class Case(NamedTuple):
    """Holds what a library stored and what it reads of it."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    expected: torch.Tensor
    fixture: str = ""
    """Name of the file that the tests read."""


def bitsandbytes() -> Iterator[Case]:
    """Yields NF4, FP4 and LLM.int8.

    The library's AVX512 code reads blocks that reach over rows wrongly (its own error is five
    times that of its plain PyTorch code), so that is compared with for those shapes.
    """
    functional = import_module("bitsandbytes.functional")
    plain = import_module("bitsandbytes.backends.default.ops")._dequantize_4bit_compute
    codes = import_module("bitsandbytes.backends.utils")._get_4bit_code
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    options = ("nf4", "fp4"), (False, True), (64, 128, 512), dtypes, (torch.uint8, torch.bfloat16)
    for (kind, nested, size, dtype, storage), shape in itertools.product(
        itertools.product(*options), (*SHAPES, (33, 50), (5, 7))
    ):
        if storage != torch.uint8 and shape[0] % 2:
            continue
        weight = random(shape).to(dtype)
        settings = {"compress_statistics": nested, "quant_type": kind, "quant_storage": storage}
        packed, state = functional.quantize_4bit(weight, blocksize=size, **settings)
        beside = {f"l.weight.{k}": v.contiguous() for k, v in state.as_dict(packed=True).items()}
        expected = functional.dequantize_4bit(packed, state)
        if shape[1] % size:
            scales = state.absmax
            if nested:
                scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
            flat = packed.reshape(-1).view(torch.uint8)
            expected = plain(flat, scales, codes(kind, flat.device), size, shape, dtype)
        kept = (size, dtype, storage, shape) == (64, torch.bfloat16, torch.uint8, TINY)
        name = f"{kind}-{'nested' if nested else 'plain'}" if kept else ""
        yield Case(config, {"l.weight": packed, **beside}, expected, name)
    for shape in SHAPES:
        quantized, scales, _ = functional.int8_vectorwise_quant(random(shape).half())
        tensors = {"l.weight": quantized, "l.SCB": scales}
        tensors["l.weight_format"] = torch.tensor(0, dtype=torch.uint8)
        found = functional.int8_vectorwise_dequant(quantized, scales)
        config, name = {"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"
        yield Case(config, tensors, found.half(), name if shape == TINY else "")


def gptq() -> Iterator[Case]:
    """Yields GPTQ's first format: several sizes of groups, symmetric or not, inputs reordered."""
    layer = alone("auto_gptq.nn_modules.qlinear.qlinear_cuda").QuantLinear
    for (bits, size, symmetric, reordered), (out, inputs) in itertools.product(
        itertools.product((2, 4, 8), (-1, 32), (True, False), (True, False)), (TINY, (96, 256))
    ):
        size = inputs if size == -1 else size
        made = layer(bits, size, inputs, out, False)
        groups = torch.arange(inputs) // size
        if reordered:
            groups = groups[torch.randperm(inputs)]
        linear = torch.nn.Linear(inputs, out, bias=False, dtype=torch.float16)
        scales = (0.01 + random((out, inputs // size)).abs()).half().float()
        drawn = torch.randint(1, 2**bits, scales.shape).float()
        zeros = torch.full_like(scales, 2 ** (bits - 1)) if symmetric else drawn
        made.pack(linear, scales, zeros, groups.int())
        expected = made(torch.eye(inputs).half()).t()
        names = ("qweight", "qzeros", "scales", "g_idx")
        config = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric}
        kept = (bits, size, symmetric, reordered, (out, inputs)) == (4, 32, False, True, TINY)
        name = "gptq" if kept else ""
        yield Case(config, {f"l.{n}": getattr(made, n) for n in names}, expected, name)


def awq() -> Iterator[Case]:
    """Yields AWQ's packing `gemm`."""
    layer = alone("awq.modules.linear.gemm").WQLinear_GEMM
    read = alone("awq.utils.packing_utils").dequantize_gemm
    for size, (out, inputs) in itertools.product((-1, 32), (TINY, (96, 256))):
        linear = torch.nn.Linear(inputs, out, bias=False, dtype=torch.float16)
        whole = inputs if size == -1 else size  # the packer itself does not know -1
        scales = (0.01 + random((inputs // whole, out)).abs()).half()
        zeros = torch.randint(0, 16, scales.shape).half()
        made = layer.from_linear(linear, 4, whole, scales=scales, zeros=zeros)
        expected = read(made.qweight, made.qzeros, made.scales, 4, made.group_size).t()
        names = ("qweight", "qzeros", "scales")
        config = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm"}
        name = "awq" if (size, out) == (32, TINY[0]) else ""
        yield Case(config, {f"l.{n}": getattr(made, n) for n in names}, expected, name)


def fp8() -> Iterator[Case]:
    """Yields fp8 with scales of blocks and of whole tensors, as transformers reads it."""
    module = import_module("transformers.integrations.finegrained_fp8")
    for block, shape in itertools.product(((128, 128), (64, 32), None), ((256, 384), (128, 256))):
        values = (100 * random(shape)).to(torch.float8_e4m3fn)
        grid = tuple(n // b for n, b in zip(shape, block)) if block else ()
        scales = random(grid or (1,)).abs().reshape(grid)
        config = {"quant_method": "fp8", "weight_block_size": block and list(block)}
        tensors = {"l.weight": values, "l.weight_scale_inv": scales}
        read = module.Fp8Dequantize(None)._dequantize_one
        yield Case(config, tensors, read(values, scales, torch.bfloat16))


def compressed() -> Iterator[Case]:
    """Yields compressed-tensors' formats."""
    library = import_module("compressed_tensors.quantization")
    base = import_module("compressed_tensors.compressors.base").BaseCompressor
    formats = (
        ("float-quantized", {"num_bits": 8, "type": "float"}, ("tensor", "channel", "block")),
        ("int-quantized", {"num_bits": 8, "type": "int"}, ("tensor", "channel")),
        ("pack-quantized", {"num_bits": 4, "type": "int"}, ("channel", "group")),
        ("pack-quantized", {"num_bits": 8, "type": "int"}, ("channel", "group")),
    )
    for format, told, strategies in formats:
        even = (True,) if told["type"] == "float" else (True, False)
        for strategy, symmetric, shape in itertools.product(strategies, even, (TINY, (96, 192))):
            weights = {**told, "strategy": strategy, "symmetric": symmetric}
            if strategy == "group":
                weights["group_size"] = 32
            if strategy == "block":
                weights["block_structure"] = [32, 32]
            args = library.QuantizationArgs(**weights)
            scheme = library.QuantizationScheme(targets=["Linear"], weights=args)
            rows, columns = shape
            grids = {"tensor": (1,), "channel": (rows, 1), "group": (rows, columns // 32)}
            grid = {**grids, "block": (-(-rows // 32), columns // 32)}[strategy]
            state = {"weight": random(shape).bfloat16()}
            state["weight_scale"] = (0.05 + random(grid).abs()).bfloat16()
            if not symmetric:
                low = 2 ** (told["num_bits"] - 1)
                state["weight_zero_point"] = torch.randint(-low, low, grid).to(torch.int8)
            compressor = base.get_value_from_registry(format)
            made = compressor.compress(state, scheme)
            expected = compressor.decompress(made, scheme)["weight"]
            groups = {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}}
            config = {"quant_method": "compressed-tensors", "format": format}
            tensors = {f"l.{k}": v.contiguous() for k, v in made.items()}
            kept = told["num_bits"] == 4 and strategy == "group" and not symmetric and shape == TINY
            name = "compressed" if kept else ""
            yield Case({**config, "config_groups": groups}, tensors, expected, name)


def alone(name: str) -> Any:
    """Imports a module without what its packages import: old ones need an older transformers."""
    *packages, _ = itertools.accumulate(name.split("."), lambda a, b: f"{a}.{b}")
    for package in (p for p in packages if p not in sys.modules):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        sys.modules[package] = made = ModuleType(package)
        made.__path__ = list(spec.submodule_search_locations or ())
    return import_module(name)


def random(shape: tuple[int, ...]) -> torch.Tensor:
    """Draws from a normal distribution."""
    return 0.1 * torch.randn(shape)


def compare(cases: Iterator[Case]) -> None:
    """Prints how far what is read here is from what the library reads."""
    count = values = differ = 0
    worst, dtypes = 0.0, set()
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            save_file(case.tensors, Path(folder) / "model.safetensors")
            config = {"quantization_config": case.config, "torch_dtype": "bfloat16"}
            if case.config.get("load_in_8bit"):
                config["torch_dtype"] = "float16"
            method = quantised.read_method(config, "config.json")
            opened = source.open_source(Path(folder), TABLE, 1, method)
            ours = opened.window("l.weight", (slice(None), slice(None)))
        assert ours.shape == tuple(case.expected.shape), (ours.shape, case.expected.shape)
        assert f"torch.{ours.dtype}" == str(case.expected.dtype), (ours.dtype, case.expected.dtype)
        a, b = ours.astype(np.float32), case.expected.detach().float().numpy()
        place = np.spacing(np.abs(b)) * 2**16  # bfloat16 has 16 bits fewer than float32
        worst = max(
            worst, float((np.abs(a - b) / np.maximum(place, np.finfo(np.float32).tiny)).max())
        )
        count, values, differ = count + 1, values + a.size, differ + int((a != b).sum())
        dtypes.add(str(ours.dtype))
    print(
        f"{count} tensors in {', '.join(sorted(dtypes))}: {differ:,} of {values:,} values differ, "
        f"by at most {worst:.2g} units of the last place of bfloat16"
    )


def save_fixtures(folder: Path, cases: Iterator[Case]) -> None:
    """Writes the cases that have a name, each with what the library reads as `expected`."""
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        if case.fixture:
            tensors = {**case.tensors, "expected": case.expected.detach()}
            tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
            told = {"config": json.dumps(case.config)}
            save_file(tensors, folder / f"{case.fixture}.safetensors", told)


LIBRARIES = {
    "bitsandbytes": (bitsandbytes, "bitsandbytes"),
    "gptq": (gptq, "auto-gptq"),
    "awq": (awq, "autoawq"),
    "fp8": (fp8, "transformers"),
    "compressed": (compressed, "compressed-tensors"),
}


def main() -> None:
    """Compares with the libraries that are named, or with all."""
    assert ml_dtypes  # registers bfloat16 with NumPy
    if sys.argv[1:2] == ["--fixtures"]:
        for cases, _ in LIBRARIES.values():
            torch.manual_seed(0)
            save_fixtures(Path(sys.argv[2]), cases())
        return
    for name in sys.argv[1:] or LIBRARIES:
        torch.manual_seed(0)
        cases, package = LIBRARIES[name]
        print(f"{package} {importlib.metadata.version(package)}: ", end="", flush=True)
        compare(cases())


if __name__ == "__main__":
    main()
