"""Runs the PyTorch side of `verify`: a folder's weights in a network that is not ours.

`transformers`' class where there is one, a plain LLaDA of our own, or, only if told to, the class
that the folder brings. None of them shares code, weight tables or config readers with the package.
Texts run one by one without padding, so that no class's reading of a padding mask matters.
"""

import contextlib
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sama_jax import gguf_header
from sama_jax.errors import ModelError, UsageError
from sama_jax.weights.safetensors import weight_files

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError:
    raise UsageError(
        "this comparison runs PyTorch, which is not installed: pip install 'sama-jax[verify]'; "
        "--dump and --against need no PyTorch on this machine"
    ) from None
from sama_jax.programs.bench.torch_adapter import merge_adapter
from sama_jax.programs.bench.torch_double import Keep, as_array, in_double


class Reference(NamedTuple):
    """Holds a loaded network.

    Both functions take token ids [b, l] without padding and return what each stage gave [b, l, d],
    by name: `embedding`, `block 1`, .., `final norm` where there is one, and `logits` [b, l, v].
    """

    name: str
    run: Callable[[np.ndarray, Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    """Computes in the dtype of the weights. Its second argument holds by name what the next stage
    reads instead of what a stage gave; empty: the network as it is."""
    exact: Callable[[np.ndarray], dict[str, np.ndarray]]
    """Computes the same in float64."""


class Wanted(NamedTuple):
    """Says what to load, and the little of the architecture that decides what is seen."""

    path: Path
    config: Mapping[str, Any]
    num_layers: int
    block_length: int | None
    """Position i sees j if j // block_length <= i // block_length; None: every j."""
    dtype: str
    adapters: Sequence[Path] = ()
    """In their order."""


SAME_MATHS = {
    "Dream": "Qwen2",
    "illada": "Llama",
    "a2d-qwen2": "Qwen2",
    "a2d-qwen3": "Qwen3",
    "a2d-llama": "Llama",
    "sdar": "Qwen3",
    "Fast_dLLM_Qwen": "Qwen2",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "llama": "Llama",
    "bert": "Bert",
    "roberta": "Roberta",
    "modernbert": "ModernBert",
    "lladamoe": "Qwen3Moe",
    "rnd1": "Qwen3Moe",
    "sdar_moe": "Qwen3Moe",
    "nemotron_labs_diffusion": "Ministral3",
}
"""`model_type` -> the class of transformers that computes the same, but for what positions see,
which an explicit mask decides. Another such family is one more line."""
_RND1 = {"norm_topk_prob": True, "num_hidden_layers": 48, "rope_theta": 1e6, "head_dim": 128}
"""Fields that Qwen3-MoE's class would give another value where RND1's config leaves them out."""
READ_GGUF = ("Llama", "Qwen2", "Qwen3")
"""Classes whose GGUF files transformers reads by itself."""


def open_reference(wanted: Wanted, *, trust_remote_code: bool = False) -> Reference:
    """Loads a folder. Raises `ModelError` for a family that has no PyTorch side here."""
    config = wanted.config
    if (wanted.path / "orbax").is_dir():
        raise ModelError(
            f"{wanted.path}: its parameters are kept by Orbax, which PyTorch does not read; verify "
            "the folder that it was made from, or one that `to-hf` writes from it"
        )
    if config.get("quantization_config"):
        raise ModelError(
            f"{wanted.path}: its weights are quantised, which the PyTorch side does not read; "
            "verify the folder that `to-hf` writes from it"
        )
    kind = config.get("model_type")
    if "ILLaDAForCausalLM" in (config.get("architectures") or ()):
        kind = "illada"
    if kind == "llada" and "num_experts" in config:
        kind = "lladamoe"
    if gguf_header.find(wanted.path) is None:
        weight_files(wanted.path)  # says so in one line if there are none
    elif trust_remote_code or SAME_MATHS.get(kind or "") not in READ_GGUF or kind == "Dream":
        raise ModelError(
            f"{wanted.path}: transformers reads GGUF files of {', '.join(READ_GGUF)} only; verify "
            "the folder that `to-hf` writes from it"
        )
    if trust_remote_code:
        return _remote(wanted)
    if kind == "llada":
        return _llada(wanted)
    if kind in SAME_MATHS:
        return _known_class(wanted, kind, SAME_MATHS[kind])
    raise ModelError(
        f"{wanted.path}: there is no PyTorch side for the family {kind or 'of this config.json'}; "
        "give the folder's own code with --trust-remote-code, or compare with a file that another "
        "framework wrote (--against F.npz)"
    )


def seen_scores(length: int, block: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Returns what each position sees, [1, 1, l, l], as a number to add to the scores."""
    place = torch.arange(length) // (block or length)
    hidden = place[None, :] > place[:, None]
    lowest = torch.finfo(dtype).min
    return torch.zeros(length, length, dtype=dtype).masked_fill(hidden, lowest)[None, None]


# --- classes of transformers and of the folder ---------------------------------------------------


def _quietly(load: Callable[[], Any], where: Path) -> Any:
    """Runs transformers' loading without its remarks; what it raises becomes one line."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(50)
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # GGUF files draw a bar of their own
            return load()
    except Exception as error:  # whatever a folder's files, or its code, can provoke in there
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ModelError(f"{where}: PyTorch cannot load it ({reason})") from None
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def _known_class(wanted: Wanted, kind: str, name: str) -> Reference:
    import transformers

    encoder = name in ("Bert", "Roberta", "ModernBert")
    cls = getattr(transformers, f"{name}{'ForMaskedLM' if encoder else 'ForCausalLM'}")
    skipped = ("model_type", "architectures", "auto_map", "transformers_version", "torch_dtype")
    fields = {k: v for k, v in wanted.config.items() if k not in (*skipped, "dtype")}
    if kind == "illada":
        fields.setdefault("tie_word_embeddings", True)
    if kind == "lladamoe":
        fields = _qwen3_moe(fields, wanted.path)
    if kind == "rnd1":
        fields = _RND1 | {k: v for k, v in fields.items() if v is not False}
    if name == "Qwen3Moe":
        fields["experts_implementation"] = "eager"  # grouped products know no float64
    options = {
        "dtype": getattr(torch, wanted.dtype),
        "attn_implementation": "sdpa",
        "local_files_only": True,
        "output_loading_info": True,
    }
    if name == "Ministral3":
        options["key_mapping"] = {r"^encoder\.": "model.", r"^diffusion_head\.": "lm_head."}
    gguf, place = gguf_header.find(wanted.path), wanted.path
    if gguf is not None:
        options["gguf_file"], place = gguf.name, gguf.parent
    load = lambda: cls.from_pretrained(  # noqa: E731
        str(place), config=getattr(transformers, f"{name}Config")(**fields), **options
    )
    module, found = _quietly(load, wanted.path)
    missing = [*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])]
    if missing:
        raise ModelError(
            f"{wanted.path}: {cls.__name__} does not find {', '.join(sorted(missing))}"
        )
    seen = None if encoder else partial(seen_scores, block=wanted.block_length, dtype=module.dtype)
    return _hooked(wanted, module, cls.__name__, seen)


def _qwen3_moe(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Returns a LLaDA-MoE's config in Qwen3-MoE's words.

    It is the same network where every layer has experts and no more. Its own code never
    renormalises the chosen experts' weights, whatever `norm_topk_prob` says.
    """
    beyond = {
        "moe_layer_freq": 0 in (config.get("moe_layer_freq") or []),
        "shared_expert_intermediate_size": config.get("shared_expert_intermediate_size"),
        "moe_router_enable_expert_bias": config.get("moe_router_enable_expert_bias"),
        "partial_rotary_factor": config.get("partial_rotary_factor", 1) != 1,
        "qk_layernorm": not config.get("qk_layernorm"),
    }
    if any(beyond.values()):
        raise ModelError(
            f"{where}: the PyTorch side of LLaDA-MoE is Qwen3-MoE's class, which has no place for "
            f"its {', '.join(k for k, v in beyond.items() if v)}; use --against"
        )
    return {
        **config,
        "moe_intermediate_size": config["expert_intermediate_size"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "rms_norm_eps": config.get("rms_norm_eps", 1e-5),
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _remote(wanted: Wanted) -> Reference:
    """Loads the class that the folder's `auto_map` names: its code runs."""
    import transformers

    known = ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel")
    automatic = [name for name in known if name in (wanted.config.get("auto_map") or {})]
    if not automatic:
        raise ModelError(
            f"{wanted.path}: --trust-remote-code runs the class that config.json names in auto_map "
            "(AutoModel, AutoModelForCausalLM or AutoModelForMaskedLM), but there is none"
        )
    cls = getattr(transformers, automatic[0])
    load = lambda: cls.from_pretrained(  # noqa: E731
        str(wanted.path),
        trust_remote_code=True,
        local_files_only=True,
        dtype=getattr(torch, wanted.dtype),
    )
    module = _quietly(load, wanted.path)
    seen = None
    if wanted.block_length is not None:
        seen = partial(seen_scores, block=wanted.block_length, dtype=module.dtype)
    return _hooked(wanted, module, f"{type(module).__name__}, the folder's own", seen)


def _hooked(
    wanted: Wanted, module: Any, name: str, seen: Callable[[int], torch.Tensor] | None
) -> Reference:
    """Reads the states with hooks: on the list of blocks, and on the norm next to it."""
    module.eval()
    for adapter in wanted.adapters:
        merge_adapter(dict(module.named_parameters()), adapter)
    found = ((n, m) for n, m in module.named_modules() if isinstance(m, nn.ModuleList))
    lists = [(n, m) for n, m in found if len(m) == wanted.num_layers]
    if not lists:
        raise ModelError(f"{wanted.path}: {name} has no list of {wanted.num_layers} blocks")
    place, blocks = lists[0]
    blocks_parent = module.get_submodule(place.rpartition(".")[0])
    # The final norm is the blocks' sibling: embeddings and heads have norms of their own.
    beside = dict(blocks_parent.named_children())
    norms = [beside[n] for n in ("norm", "ln_f", "final_norm", "final_layernorm") if n in beside]

    def run(tokens: np.ndarray, instead: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        keep = Keep(instead)

        def enter(_: Any, args: Any, named: Any) -> Any:
            if args:
                return (keep("embedding", args[0]), *args[1:]), named
            return args, {**named, "hidden_states": keep("embedding", named["hidden_states"])}

        hooks = [blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
        for i, block in enumerate(blocks):
            said = f"block {i + 1}"
            hook = block.register_forward_hook(lambda _m, _i, out, said=said: keep(said, out))
            hooks.append(hook)
        if norms:
            hooks.append(norms[0].register_forward_hook(lambda _m, _i, o: keep("final norm", o)))
        mask = {} if seen is None else {"attention_mask": seen(tokens.shape[1])}
        try:
            with torch.no_grad():
                out = module(input_ids=torch.from_numpy(tokens).long(), **mask)
        except Exception as error:  # the folder's own code may do anything
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise ModelError(f"{wanted.path}: {name} cannot run ({reason})") from None
        finally:
            for hook in hooks:
                hook.remove()
        return {**keep.states, "logits": as_array(out.logits)}

    def exact(tokens: np.ndarray) -> dict[str, np.ndarray]:
        with in_double(module):
            return run(tokens, {})

    return Reference(name, run, exact)


# --- LLaDA ---------------------------------------------------------------------------------------


def _llada(wanted: Wanted) -> Reference:
    config, weights = dict(wanted.config), llada_weights(wanted)

    def run(tokens: np.ndarray, instead: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        keep = Keep(instead)
        logits = llada_logits(config, weights, torch.from_numpy(tokens).long(), keep=keep)
        return {**keep.states, "logits": as_array(logits)}

    def exact(tokens: np.ndarray) -> dict[str, np.ndarray]:
        with in_double():
            return run(tokens, {})

    return Reference("a plain LLaDA in PyTorch", run, exact)


def llada_weights(wanted: Wanted) -> dict[str, torch.Tensor]:
    """Reads a dense LLaDA's tensors by the names of its modelling code, without groups."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(wanted.path):
        tensors |= load_file(file)
    for adapter in wanted.adapters:
        merge_adapter(tensors, adapter)
    dtype = getattr(torch, wanted.dtype)
    inner = r"^.*?transformer\.|(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
    weights = {re.sub(inner, "", n): t.to(dtype) for n, t in tensors.items()}
    size = wanted.config.get("block_group_size", 1)
    if size > 1:
        flat = lambda m: f"blocks.{size * int(m[1]) + int(m[2])}."  # noqa: E731
        weights = {re.sub(r"^block_groups\.(\d+)\.(\d+)\.", flat, n): t for n, t in weights.items()}
    return weights


@torch.no_grad()
def llada_logits(
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    tokens: torch.Tensor,
    valid: torch.Tensor | None = None,
    keep: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, x: x,
) -> torch.Tensor:
    """Computes a dense LLaDA, written from its modelling code's description (docs/models.md).

    Args:
      config: the fields of config.json.
      weights: `llada_weights`.
      tokens: ids [b, l].
      valid: bool [b, l]; only these positions are seen. None: all of them.
      keep: told the stream [b, l, d] after every stage, by its name; what it returns goes on.

    Returns:
      Logits [b, l, v].
    """
    heads = config.get("n_heads", 12)
    half = weights["wte.weight"].shape[1] // heads // 2
    speed = config.get("rope_theta", 10000.0) ** -(torch.arange(half).float() / half)
    angle = torch.outer(torch.arange(tokens.shape[1]).float(), speed)
    seen = None if valid is None else valid[:, None, None, :]
    llada = _Llada(config, weights, heads, angle, seen)

    x = weights["wte.weight"][tokens]
    if config.get("input_emb_norm"):
        x = x * x.shape[-1] ** 0.5
    x = keep("embedding", x)
    for i in range(config["n_layers"]):
        x = llada.block(f"blocks.{i}", x)
        x = keep(f"block {i + 1}", x)
    x = llada.norm("ln_f", x)
    x = keep("final norm", x)
    # Tied unless the config says otherwise, as its class has it.
    tied = config.get("weight_tying", True)
    logits = F.linear(x, weights["wte.weight"]) if tied else llada.linear("ff_out", x)
    if config.get("scale_logits"):
        logits = logits * (1 / math.sqrt(x.shape[-1]))
    return logits


class _Llada(NamedTuple):
    """Computes the parts of a dense LLaDA from its tensors by name."""

    config: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]
    heads: int
    angle: torch.Tensor
    """[l, a / 2]: how far a head's components turn at each position, in radians."""
    seen: torch.Tensor | None
    """Bool [b, 1, 1, l]; None: every position."""

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        epsilon = self.config.get("rms_norm_eps", 1e-5)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        out = self.weights[f"{name}.weight"] * wide.to(x.dtype)
        bias = self.weights.get(f"{name}.bias")
        return out if bias is None else out + bias

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotates [b, heads, l, a]; component j turns with component j + a / 2."""
        wide = x.float() if self.config.get("rope_full_precision", True) else x
        cos, sin = self.angle.cos().to(wide.dtype), self.angle.sin().to(wide.dtype)
        first, second = wide.chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        return turned.to(x.dtype)

    def attention(self, at: str, h: torch.Tensor) -> torch.Tensor:
        b, length, width = h.shape
        one = 1 if self.config.get("multi_query_attention") else self.heads
        groups = self.config.get("n_kv_heads") or one
        q, k, v = (self.linear(f"{at}.{name}_proj", h) for name in "qkv")
        if f"{at}.q_norm.weight" in self.weights:
            q, k = self.norm(f"{at}.q_norm", q), self.norm(f"{at}.k_norm", k)
        head = width // self.heads
        q, k, v = (t.view(b, length, -1, head).transpose(1, 2) for t in (q, k, v))
        q, k = self.rotate(q), self.rotate(k)
        if groups != self.heads:
            k, v = (t.repeat_interleave(self.heads // groups, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen)
        return self.linear(f"{at}.attn_out", out.transpose(1, 2).reshape(b, length, -1))

    def block(self, at: str, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(at, self.norm(f"{at}.attn_norm", x))
        h = self.norm(f"{at}.ff_norm", x)
        gated = F.silu(self.linear(f"{at}.ff_proj", h)) * self.linear(f"{at}.up_proj", h)
        return x + self.linear(f"{at}.ff_out", gated)
