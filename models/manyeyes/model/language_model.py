"""Any Hugging Face causal language model: loading it, its decoder, its head."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig

from manyeyes.errors import RecipeError, SourceError
from manyeyes.sources import committed_config, language_model_config_file, resolve_source

_SCRATCH = "scratch:"
# Of a hub repository, what says what the model is and how it reads text.
_WITHOUT_WEIGHTS = ("*.json", "*.model", "*.txt", "*.jinja")


def resolve_language_model(source: str, *, snapshot_path: Path | None, fetch_weights: bool = True) -> tuple[Path, bool]:
    """Find a language model's folder.

    Args:
        source: As for ``resolve_source``. ``scratch:<source>`` takes configuration and tokenizer from there and
            starts from fresh weights.
        snapshot_path: Folder of the data snapshot; needed for ``snapshot:``.
        fetch_weights: Whether the hub's weights are fetched too; else configuration and tokenizer alone.

    Returns:
        The folder, and whether its weights are wanted.

    Raises:
        SourceError: Nothing there, or no folder with a ``config.json``.
    """
    scratch = source.startswith(_SCRATCH)
    where = source.removeprefix(_SCRATCH)
    parts = () if fetch_weights else _WITHOUT_WEIGHTS
    path = resolve_source(where, snapshot_path=snapshot_path, parts=parts) if where else None
    if path is None or not (path / "config.json").is_file():
        raise SourceError(
            f'language model source is "{source}"',
            "a folder with config.json, weights and tokenizer is needed",
            "Name one, or scratch:<folder> for fresh weights of that configuration.",
        )
    return path, not scratch


def load_language_model(path: Path, *, pretrained: bool) -> PreTrainedModel:
    """Read or make a causal language model in fp32, in evaluation mode.

    Args:
        path: A Hugging Face folder.
        pretrained: Whether its weights are read; else they are drawn from torch's global generator.

    Raises:
        SourceError: Not a causal language model, or its weights are incomplete.
    """
    config = load_language_model_config(path)
    if not pretrained:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise SourceError(
            f"language model {path} cannot be read ({error})", "a causal language model", "Check the source."
        ) from error
    absent = sorted(map(str, report["missing_keys"])) + sorted(map(str, report["mismatched_keys"]))
    if absent:
        raise SourceError(
            f"language model {path} lacks {', '.join(absent[:3])} ({len(absent)} tensors)",
            "all its weights are needed",
            "Fetch it again, or check that config.json belongs to it.",
        )
    # A folder of this machine: a checkpoint must not depend on it.
    model.config.name_or_path = ""
    return model.eval()


def load_language_model_config(path: Path) -> PreTrainedConfig:
    """Read a language model's ``config.json``.

    Raises:
        SourceError: Not readable, or of a kind that transformers does not know.
    """
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (AttributeError, LookupError, OSError, StrictDataclassError, TypeError, ValueError) as error:
        raise SourceError(f"{path}/config.json cannot be used ({error})", "a known model", "Check it.") from error
    config.name_or_path = ""
    return config


def language_model_config(source: str, *, snapshot_path: Path | None) -> PreTrainedConfig:
    """The configuration of a language model; arguments and errors as ``language_model_config_file``."""
    path = language_model_config_file(source, snapshot_path=snapshot_path)
    if path != committed_config(source.removeprefix("scratch:")):
        return load_language_model_config(path.parent)
    config: PreTrainedConfig = AutoConfig.for_model(**json.loads(path.read_text(encoding="utf-8")))
    return config


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Make sure that every token of the tokenizer has its row in the language model's embedding table.

    An ``<image>`` beyond the table is let through: visual tokens stand in its place, and it is never looked up.

    Raises:
        SourceError: The vocabulary is smaller than the tokenizer's.
    """
    known = {token: number for token, number in tokenizer.get_vocab().items() if token != "<image>"}
    beyond = sorted((number, token) for token, number in known.items() if number >= config.vocab_size)
    if beyond:
        shown = ", ".join(f'"{token}" is {number}' for number, token in beyond[:3])
        raise SourceError(
            f"tokenizer has {len(beyond)} tokens beyond the language model's vocabulary ({shown})",
            f"ids below {config.vocab_size}, the rows of its embedding table",
            "Use the tokenizer that belongs to the weights, or grow their table first (resize_token_embeddings).",
        )


def find_image_token_id(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """Id that stands where visual tokens go.

    Spans say where images are, so any id of the vocabulary will do: the tokenizer's own ``<image>`` where it has one,
    else its padding token. The vocabulary is never grown, and embedding tables keep their published size.
    """
    known = tokenizer.get_vocab().get("<image>")
    return int(known if known is not None and known < config.vocab_size else tokenizer.pad_token_id)


def decoder_of(language_model: PreTrainedModel) -> nn.Module:
    """The transformer inside a causal language model, without its head."""
    decoder: nn.Module = getattr(language_model, language_model.base_model_prefix)
    return decoder


def decoder_layers(language_model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a causal language model's decoder, in order.

    Raises:
        RecipeError: A family whose decoder is no stack of layers.
    """
    decoder = decoder_of(language_model)
    num_layers = language_model.config.get_text_config().num_hidden_layers
    stacks = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == num_layers]
    if len(stacks) != 1:
        raise RecipeError(
            f"a language model of the kind {type(decoder).__name__}",
            f"a decoder that is one stack of {num_layers} layers",
            "Use a language model that has one, for instance Llama, Mistral, Qwen2 or Gemma.",
        )
    return stacks[0]


# What attention is computed by; the rest of a layer takes less time to compute again than memory to keep.
_KEPT = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


def recompute_layers(language_model: PreTrainedModel) -> None:
    """Let every layer of the decoder compute its inside again in the backward pass, all but attention, in place.

    Gradients are the same. transformers' own checkpointing leaves frozen models out, which keep as much for the
    gradients of what stands before them, and drops a cache without an error. Here the keys and values of a layer that
    writes to a cache are among its results.

    Raises:
        RecipeError: As ``decoder_layers``.
    """
    for number, layer in enumerate(decoder_layers(language_model)):
        layer.forward = _Recomputed(layer.forward, number)  # type: ignore[method-assign, assignment]


def compile_layers(language_model: PreTrainedModel, *, backend: str = "inductor") -> None:
    """Have torch compile every layer of the decoder the first time that it runs, in place; after ``recompute_layers``.

    Args:
        language_model: Not yet sharded.
        backend: One of ``torch.compiler.list_backends``.

    Raises:
        RecipeError: As ``decoder_layers``.
    """
    for layer in decoder_layers(language_model):
        layer.compile(backend=backend)


@dataclass(frozen=True)
class _Recomputed:
    # An object and no closure, so that a deep copy of a model computes with its own layers.
    forward: Callable[..., Any]
    number: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        # Families name it otherwise, or not at all.
        cache = next((given for given in (*args, *kwargs.values()) if isinstance(given, Cache)), None)
        if cache is None:
            return _again(self.forward, *args, **kwargs)
        before = cache.layers[self.number]
        written: list[Any] = []

        def run(*args: Any, **kwargs: Any) -> tuple[Any, Tensor, Tensor]:
            # The second time, too, on what the layer found there the first time.
            own, view = copy.copy(before), copy.copy(cache)
            view.layers = [*cache.layers]
            view.layers[self.number] = own
            args = tuple(view if given is cache else given for given in args)
            kwargs = {name: view if given is cache else given for name, given in kwargs.items()}
            output = self.forward(*args, **kwargs)
            if not written:
                written.append(own)
            return output, own.keys, own.values

        output, keys, values = _again(run, *args, **kwargs)
        written[0].keys, written[0].values = keys, values
        cache.layers[self.number] = written[0]
        return output


def _again(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    kind = next(given.device.type for given in (*args, *kwargs.values()) if isinstance(given, Tensor))

    def compute(*args: Any, **kwargs: Any) -> Any:
        # Prefixes and branches go through the same layers: autocast would find the second's weights converted, and not
        # when they are computed again.
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
            return run(*args, **kwargs)

    policy = partial(create_selective_checkpoint_contexts, _KEPT)
    return checkpoint(compute, *args, use_reentrant=False, context_fn=policy, **kwargs)


def compute_logits(language_model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits of chosen positions, as the model's own forward would give them.

    Args:
        language_model: A causal language model.
        hidden: ``[..., D]``, the decoder's last hidden state at any choice of positions.

    Returns:
        ``[..., V]``.
    """
    config = language_model.config
    logits: Tensor = language_model.get_output_embeddings()(hidden)
    # What model families do behind their head, by the field of their configuration (transformers 5.23):
    # Granite divides, Cohere multiplies, Gemma 2 caps.
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (factor := getattr(config, "logit_scale", None)) is not None:
        logits = logits * factor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits
