from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import RotaryEmbeddingCat
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, MixtralConfig

from manyeyes import encoders
from manyeyes.encoders import Encoder, EncoderFamily, EncoderRow
from manyeyes.errors import CheckpointError, RecipeError, ShapeError, SourceError, StorageError
from manyeyes.model import (
    ManyEyesConfig,
    ManyEyesForConditionalGeneration,
    ManyEyesProcessor,
    build_model,
    checkpoint_digest,
    load_checkpoint,
    save_checkpoint,
    write_manifest,
)
from manyeyes.model import checkpoint as checkpoints
from manyeyes.model.checkpoint import gather_checkpoint, load_empty_checkpoint, load_noted_checkpoint
from manyeyes.model.configuration import EncoderConfig, SharedPixelsConfig
from manyeyes.model.stored import Stored
from manyeyes.recipe import FusionSpec, ProjectorSpec, ReinjectionSpec
from manyeyes.runtime.tiling import TokenLayout
from tests.model_toys import toy_config, toy_images, toy_spec, write_language_model

Parts = tuple[ManyEyesForConditionalGeneration, ManyEyesProcessor]
PRINT_LOGITS = """
import hashlib, sys, torch
from pathlib import Path
from manyeyes.model import load_checkpoint
model, _ = load_checkpoint(Path(sys.argv[1]))
batch = torch.load(sys.argv[2])
with torch.no_grad():
    logits = model(**batch).logits
print(hashlib.sha256(logits.numpy().tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("language-model"))


@pytest.fixture(scope="module")
def parts(language_model: Path) -> Parts:
    return build_model(toy_spec(language_model), snapshot_path=None, seed=1)


@pytest.fixture(scope="module")
def checkpoint(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "sft"
    save_checkpoint(*parts, path)
    return path


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copied"))


@pytest.mark.parametrize("file_size", ["5GB", "200KB"])
def test_a_checkpoint_written_a_tensor_at_a_time_is_the_same_byte_for_byte(
    file_size: str, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_FILE_SIZE", file_size)
    asked: list[tuple[int, ...]] = []

    def whole(tensor: Tensor) -> Tensor:
        asked.append(tuple(tensor.shape))
        return tensor.detach().clone()

    digests = [save_checkpoint(*parts, tmp_path / "at once"), save_checkpoint(*parts, tmp_path / "one", whole=whole)]
    assert digests[0] == digests[1]
    written = list(asked)
    asked.clear()
    # Another process that has parts of them asks for the same.
    gather_checkpoint(parts[0], whole)
    assert asked == written
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == (1 if file_size == "5GB" else 37)


def test_an_empty_model_has_the_tensors_of_a_full_one(language_model: Path, parts: Parts, checkpoint: Path) -> None:
    built, _ = build_model(toy_spec(language_model), snapshot_path=None, seed=1, empty=True)
    loaded, _ = load_empty_checkpoint(checkpoint)
    expected = [(name, tensor.shape, tensor.dtype) for name, tensor in parts[0].state_dict().items()]
    for empty in (built, loaded):
        assert [(name, tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()] == expected
        assert all(tensor.is_meta for tensor in empty.state_dict().values())


def fill(stored: Stored) -> None:
    with torch.no_grad():
        for tensor, where in stored.items():
            tensor.copy_(where.read())


@pytest.mark.parametrize("file_size", ["5GB", "200KB"])
def test_weights_that_are_noted_and_read_later_make_the_same_checkpoint(
    file_size: str, parts: Parts, language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_FILE_SIZE", file_size)
    digest = save_checkpoint(*parts, tmp_path / "before")
    spec = toy_spec(language_model)
    makers: list[Callable[[Stored], Parts]] = [
        lambda stored: load_noted_checkpoint(tmp_path / "before", stored=stored),
        lambda stored: build_model(spec, snapshot_path=None, seed=1, stored=stored),
    ]
    for make in makers:
        stored: Stored = {}
        model, processor = make(stored)
        with torch.no_grad():
            for tensor in stored:
                tensor.zero_()  # what a new tensor holds is whatever was in its memory, perhaps these very weights
        fill(stored)
        assert save_checkpoint(model, processor, tmp_path / "after") == digest


def test_weights_in_other_tensors_than_the_models_are_read_at_once(language_model: Path, tmp_path: Path) -> None:
    half, short, experts = (tmp_path / name for name in ("half", "short names", "experts"))
    for folder in (half, short):
        shutil.copytree(language_model, folder)
    weights = load_file(language_model / "model.safetensors")
    halved = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    save_file(halved, half / "model.safetensors", metadata={"format": "pt"})
    renamed = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(renamed, short / "model.safetensors", metadata={"format": "pt"})
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    write_language_model(experts, MixtralConfig(**sizes, **special, num_key_value_heads=2, num_local_experts=2))
    for folder, noted in ((half, True), (short, False), (experts, False)):
        stored: Stored = {}
        expected, _ = build_model(toy_spec(folder), snapshot_path=None, seed=1)
        found, _ = build_model(toy_spec(folder), snapshot_path=None, seed=1, stored=stored)
        assert bool(stored) == noted
        fill(stored)
        pairs = zip(expected.state_dict().values(), found.state_dict().values(), strict=True)
        assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in pairs)


def question(processor: ManyEyesProcessor) -> dict[str, Tensor]:
    return dict(processor(images=toy_images(2), text="what is the colour?"))


def test_new_process_computes_the_same_logits_bit_for_bit(parts: Parts, checkpoint: Path, tmp_path: Path) -> None:
    model, processor = parts
    batch = question(processor)
    torch.save(batch, tmp_path / "batch.pt")
    with torch.no_grad():
        logits = model(**batch).logits
    command = [sys.executable, "-c", PRINT_LOGITS, str(checkpoint), str(tmp_path / "batch.pt")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.split()[-1] == hashlib.sha256(logits.numpy().tobytes()).hexdigest()


def test_same_weights_give_the_same_digest(parts: Parts, checkpoint: Path, tmp_path: Path) -> None:
    assert save_checkpoint(*load_checkpoint(checkpoint), tmp_path / "again") == checkpoint_digest(checkpoint)


def test_same_seed_gives_the_same_model_and_another_seed_another(parts: Parts, language_model: Path) -> None:
    before = torch.random.get_rng_state()
    same, _ = build_model(toy_spec(language_model), snapshot_path=None, seed=1)
    other, _ = build_model(toy_spec(language_model), snapshot_path=None, seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    state, expected = same.state_dict(), parts[0].state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert not torch.equal(other.projector.layers.linear_1.weight, same.projector.layers.linear_1.weight)
    assert torch.equal(
        other.language_model.get_input_embeddings().weight, same.language_model.get_input_embeddings().weight
    )


def test_files_beside_the_checkpoint_do_not_count(copied: Path) -> None:
    digest = checkpoint_digest(copied)
    (copied / "stage.json").write_text("{}", encoding="utf-8")
    assert checkpoint_digest(copied) == digest


def test_changed_file_is_refused(copied: Path) -> None:
    weights = copied / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed"):
        load_checkpoint(copied)


def test_missing_file_is_named(copied: Path) -> None:
    (copied / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks tokenizer\.json"):
        load_checkpoint(copied)


def test_broken_manifest_is_refused(copied: Path) -> None:
    (copied / "checkpoint.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="broken"):
        checkpoint_digest(copied)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("config.json", {"text_config": []}),
        ("config.json", {"text_config": {"model_type": "llama", "hidden_size": "wide"}}),
        ("config.json", {"encoders": [{"name": 1}]}),
        ("config.json", {"encoders": "clip"}),
        ("config.json", {"fusion": None}),
        ("config.json", {"layout": {"tiling": "grid", "image_grid": -1}}),
        ("processor_config.json", {"transforms": {"a": {"size": "64"}}}),
        ("processor_config.json", {"transforms": []}),
        ("processor_config.json", {"layout": {"tiling": 1}}),
        ("processor_config.json", {"template": 7}),
        ("processor_config.json", {"image_marks": 3}),
        ("tokenizer.json", {"model": None}),
    ],
)
def test_files_that_make_no_sense_are_refused_though_their_checksums_are_right(
    copied: Path, name: str, fields: dict[str, Any]
) -> None:
    content = json.loads((copied / name).read_text(encoding="utf-8"))
    (copied / name).write_text(json.dumps({**content, **fields}), encoding="utf-8")
    (copied / "checkpoint.json").unlink()
    write_manifest(copied)
    with pytest.raises((CheckpointError, RecipeError, ShapeError, SourceError)):
        load_checkpoint(copied)


def test_config_keeps_the_types_of_the_recipe(checkpoint: Path) -> None:
    config = ManyEyesConfig.from_pretrained(checkpoint)
    assert isinstance(config.fusion, FusionSpec)
    assert isinstance(config.projector, ProjectorSpec)
    assert [type(encoder) for encoder in config.encoders] == [EncoderConfig] * len(config.encoders)
    typed = ManyEyesConfig(
        text_config=config.text_config,
        encoders=config.encoders,
        fusion=config.fusion,
        projector=config.projector,
        reinjection=ReinjectionSpec(stride=2),
        layout=TokenLayout(tiling="grid", whole=("vit",)),
        shared_pixels=SharedPixelsConfig(image_size=64, align_corners=True, antialias=False),
    )
    # As a file has them, with fields that a later version may add; a part's options were not always written.
    plain = json.loads(typed.to_json_string())
    del plain["projector"]["options"]
    plain |= {"later": 1, "fusion": {**plain["fusion"], "later": 2}}
    plain["encoders"][0]["later"] = 3
    read = ManyEyesConfig.from_dict(plain)
    assert read.later == 1
    del read.later
    assert read.to_json_string() == typed.to_json_string()
    assert (read.layout, read.shared_pixels) == (typed.layout, typed.shared_pixels)


def test_config_file_from_before_parts_had_types_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    text_config = {"model_type": "llama", "hidden_size": 32, "vocab_size": 64, "num_attention_heads": 4}
    old = {
        "architectures": ["ManyEyesForConditionalGeneration"],
        "model_type": "manyeyes",
        "dtype": "float32",
        "encoders": [
            {
                "name": "clip",
                "encoder": "clip-l14-336",
                "image_size": 336,
                "small": False,
                "architecture": {"depth": 3, "windows": [1, 2]},
            },
            {"name": "vit", "encoder": "vit-tiny-p16-64", "image_size": 64, "small": True},
        ],
        "fusion": {"strategy": "channel-concat", "grid": 24, "options": {"align_corners": None}},
        "projector": {"kind": "mlp", "depth": 2, "options": {}},
        "reinjection": {"start": 0, "stride": 2, "count": None},
        "layout": {
            "tiling": "anyres",
            "pinpoints": [[1, 2], [2, 1]],
            "image_grid": 2,
            "newline": True,
            "newline_at": "rows",
            "unpad": True,
            "whole": [],
            "tile_size": 336,
        },
        "shared_pixels": {"image_size": 96, "align_corners": True, "antialias": False},
        "image_token_id": 5,
    }
    (tmp_path / "config.json").write_text(json.dumps({**old, "text_config": text_config}), encoding="utf-8")
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.encoders[0].architecture == {"depth": 3, "windows": [1, 2]}
    assert config.reinjection == ReinjectionSpec(stride=2)
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    assert {name: again[name] for name in old} == old


def test_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint\.json"):
        load_checkpoint(tmp_path)


def test_full_disk_is_noticed_before_the_old_checkpoint_is_touched(
    parts: Parts, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = checkpoint_digest(copied)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 90, 10))
    with pytest.raises(StorageError, match="the checkpoint takes"):
        save_checkpoint(*parts, copied)
    assert checkpoint_digest(copied) == digest


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device")]
)
def test_disk_that_fills_up_leaves_nothing_half_written(
    failure: Exception, parts: Parts, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = checkpoint_digest(copied)

    def fill_up(self: Any, folder: Path, **options: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise failure

    monkeypatch.setattr(ManyEyesForConditionalGeneration, "save_pretrained", fill_up)
    with pytest.raises(StorageError, match="No space left"):
        save_checkpoint(*parts, copied)
    assert checkpoint_digest(copied) == digest
    assert [entry.name for entry in copied.parent.iterdir()] == ["copied"]


def test_auto_classes_know_the_model(checkpoint: Path) -> None:
    assert isinstance(AutoConfig.from_pretrained(checkpoint), ManyEyesConfig)
    assert isinstance(AutoModelForImageTextToText.from_pretrained(checkpoint), ManyEyesForConditionalGeneration)
    assert isinstance(AutoProcessor.from_pretrained(checkpoint), ManyEyesProcessor)


def test_embeddings_stay_tied_after_loading(checkpoint: Path) -> None:
    model, _ = load_checkpoint(checkpoint)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    names = [name for name, _ in model.parameter_groups()["language_model"]]
    assert len(names) == len(set(names)) == sum(1 for _ in model.language_model.parameters())


def test_untied_head_stays_its_own_after_loading(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "untied", toy_config(0, tie_word_embeddings=False))
    parts = build_model(toy_spec(folder), snapshot_path=None, seed=1)
    save_checkpoint(*parts, tmp_path / "checkpoint")
    model, _ = load_checkpoint(tmp_path / "checkpoint")
    assert torch.equal(model.get_output_embeddings().weight, parts[0].get_output_embeddings().weight)
    assert not torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


class _RotaryEncoder(Encoder):
    """Has what EVA-02 has: a table in a non-persistent buffer."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = nn.functional.avg_pool2d(pixel_values, 16).flatten(2).transpose(1, 2)
        tokens = self.net.widen(patches)
        table = self.net.rotary.get_embed((self.grid, self.grid))
        return (tokens * table[:, :8].cos()).transpose(1, 2).unflatten(2, (self.grid, self.grid))


def _build_rotary(architecture: object, image_size: int) -> Encoder:
    net = nn.Module()
    net.widen = nn.Linear(3, 8)
    net.rotary = RotaryEmbeddingCat(8, in_pixels=False, feat_shape=[image_size // 16, image_size // 16])
    return _RotaryEncoder(net, channels=8, stride=16, image_size=image_size)


def test_buffers_that_are_not_saved_survive_loading(
    language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = EncoderRow(
        family="rotary",
        channels=8,
        stride=16,
        image_size=64,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        parameters=32,
        pretraining="none",
        licence="none",
        source="scratch:",
        paper="none",
    )
    monkeypatch.setitem(encoders.FAMILIES, "rotary", EncoderFamily(build=_build_rotary, convert=lambda state, _: state))
    monkeypatch.setitem(encoders.ENCODERS, "rotary", row)
    spec = toy_spec(language_model, encoders=[{"name": "rotary", "encoder": "rotary"}])
    model, processor = build_model(spec, snapshot_path=None, seed=1)
    unsaved = dict(model.named_non_persistent_buffers())
    assert any("rotary" in name for name in unsaved)
    save_checkpoint(model, processor, tmp_path / "checkpoint")
    loaded, _ = load_checkpoint(tmp_path / "checkpoint")
    batch = question(processor)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_tensor_missing_from_the_weights_is_refused(copied: Path) -> None:
    from manyeyes.model import CheckpointManifest
    from manyeyes.model.checkpoint import _digest
    from manyeyes.storage import hash_file

    weights = copied / "model.safetensors"
    tensors = load_file(weights)
    del tensors["projector.layers.linear_1.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    manifest = CheckpointManifest.model_validate_json((copied / "checkpoint.json").read_text(encoding="utf-8"))
    files = {**manifest.files, "model.safetensors": hash_file(weights)}
    (copied / "checkpoint.json").write_text(
        CheckpointManifest(files=files, digest=_digest(files)).model_dump_json(), encoding="utf-8"
    )
    with pytest.raises(CheckpointError, match=r"projector\.layers\.linear_1\.weight"):
        load_checkpoint(copied)


def test_prealign_builds_with_the_chosen_encoder_alone(language_model: Path) -> None:
    model, processor = build_model(toy_spec(language_model), snapshot_path=None, seed=1, encoders=["efficientnet"])
    assert list(model.encoders) == list(processor.image_transforms) == ["efficientnet"]
    assert model.projector.in_channels == 112
    assert model(**question(processor)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "encoders", "error", "message"),
    [
        ({}, ["efficientnett"], RecipeError, 'Did you mean "efficientnet"'),
        ({"chat": {"template": "vicuna"}}, None, RecipeError, 'Did you mean "vicuna_v1"'),
        ({"language_model": {"source": "scratch:"}}, None, SourceError, "a folder with config.json"),
    ],
)
def test_what_cannot_be_built_says_why(
    changes: dict[str, Any], encoders: list[str] | None, error: type, message: str, language_model: Path
) -> None:
    with pytest.raises(error, match=message):
        build_model(toy_spec(language_model, **changes), snapshot_path=None, seed=1, encoders=encoders)


def test_colour_of_the_padding_comes_from_the_recipe(language_model: Path) -> None:
    encoders = [
        {"name": "vit", "encoder": "vit-tiny-p16-64", "fill": [122, 116, 104]},
        {"name": "efficientnet", "encoder": "efficientnet-lite0", "image_size": 64},
    ]
    _, processor = build_model(toy_spec(language_model, encoders=encoders), snapshot_path=None, seed=1)
    filled = {name: transform.fill_colour for name, transform in processor.image_transforms.items()}
    assert filled == {"vit": (122, 116, 104), "efficientnet": (127, 127, 127)}


def test_language_model_from_scratch_takes_configuration_only(language_model: Path, parts: Parts) -> None:
    spec = toy_spec(language_model, language_model={"source": f"scratch:dir:{language_model}"})
    model, _ = build_model(spec, snapshot_path=None, seed=1)
    assert model.config.text_config.hidden_size == 32
    assert not torch.equal(model.get_input_embeddings().weight, parts[0].get_input_embeddings().weight)


def test_pretrained_parts_come_from_package_and_snapshot(language_model: Path, tmp_path: Path) -> None:
    pretrained = encoders.build_encoder("vit-tiny-p16-64")
    (tmp_path / "pretrained/vit").mkdir(parents=True)
    save_file(pretrained.net.state_dict(), tmp_path / "pretrained/vit/model.safetensors")
    shutil.copytree(language_model, tmp_path / "pretrained/lm")
    published = encoders.ENCODERS["efficientnet-lite0"].source
    spec = toy_spec(
        tmp_path,
        encoders=[
            {"name": "vit", "encoder": "vit-tiny-p16-64", "source": "snapshot:pretrained/vit"},
            {"name": "lite", "encoder": "efficientnet-lite0", "image_size": 64, "source": published},
        ],
        language_model={"source": "snapshot:pretrained/lm"},
    )
    model, _ = build_model(spec, snapshot_path=tmp_path, seed=1)
    for key, tensor in pretrained.net.state_dict().items():
        assert torch.equal(model.encoders["vit"].net.state_dict()[key], tensor)
    # The first value of the published stem, as its file has it.
    assert model.encoders["lite"].net.conv_stem.weight.flatten()[0].item() == pytest.approx(-1.1103, abs=1e-4)
    stored = load_file(language_model / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.language_model.state_dict()[name], stored[name])
