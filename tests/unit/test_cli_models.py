"""``manyeyes encoders, fusions, projectors``, and the page about them."""

from __future__ import annotations

import json
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from manyeyes.cli.chat import render_command
from manyeyes.cli.recipes import encoders_command, fusions_command, projectors_command
from manyeyes.encoders import ENCODERS
from manyeyes.errors import RecipeError
from manyeyes.fusion import FUSIONS, build_fusion
from manyeyes.model.projector import PROJECTORS
from manyeyes.runtime.templates import CHAT_TEMPLATES


def output(command: object, *arguments: str) -> str:
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)  # type: ignore[arg-type]
    assert result.exit_code == 0
    return result.stdout


def test_encoders_are_listed_and_loose_sources_marked() -> None:
    lines = output(encoders_command).splitlines()
    assert [line.split()[0] for line in lines] == list(ENCODERS)
    for line, row in zip(lines, ENCODERS.values(), strict=True):
        assert line.endswith("source not pinned") == row.source.endswith("@main")
    result = CliRunner().invoke(encoders_command, [])
    assert "Write source: hub:<id>@<commit> in the recipe." in result.stderr


def test_encoder_is_shown_in_full() -> None:
    shown = output(encoders_command, "clip-l14-336")
    assert "parameters     290,909,184\n" in shown
    assert "source         hub:openai/clip-vit-large-patch14-336@" in shown
    assert "pinned         yes\n" in shown
    loose = output(encoders_command, "pix2struct-l16-1024")
    assert "Not pinned: write source: hub:google/pix2struct-large@<commit> in the recipe.\n" in loose


def test_encoder_as_json_has_the_same_facts() -> None:
    row = ENCODERS["sam-l16-1024"]
    facts = json.loads(output(encoders_command, "sam-l16-1024", "--json"))
    assert (facts["channels"], facts["stride"], facts["image_size"]) == (row.channels, row.stride, row.image_size)
    assert facts["mean"] == list(row.mean)
    assert json.loads(output(encoders_command, "--json"))["sam-l16-1024"] == facts


def test_fusions_show_their_options_with_type_default_and_meaning() -> None:
    assert [line.split()[0] for line in output(fusions_command).splitlines()] == list(FUSIONS)
    shown = output(fusions_command, "spatial-vision-aggregator")
    assert "  depth          whole number from 1, default 3\n                 Cross-attention blocks.\n" in shown
    assert "  mask_padding   true or false, default false\n" in shown
    assert "  windows        list of whole numbers, default []\n" in shown


@pytest.mark.parametrize("name", FUSIONS)
def test_every_option_of_a_fusion_is_shown(name: str) -> None:
    shown = output(fusions_command, name)
    for option, field in FUSIONS[name].options.model_fields.items():
        assert f"  {option} " in shown
        assert field.description
        assert field.description in shown


@pytest.mark.parametrize("name", PROJECTORS)
def test_every_option_of_a_projector_is_shown(name: str) -> None:
    shown = output(projectors_command, name)
    for option, field in PROJECTORS[name].model_fields.items():
        assert f"  {option} " in shown
        assert field.description
        assert field.description in shown
    assert bool(PROJECTORS[name].model_fields) != (shown == "options   none\n")


@pytest.mark.parametrize(
    ("command", "name", "nearest"),
    [
        (encoders_command, "clip-l14-33", "clip-l14-336"),
        (fusions_command, "channel-conct", "channel-concat"),
        (projectors_command, "resampla", "resampler"),
    ],
)
def test_unknown_part_offers_the_nearest(command: object, name: str, nearest: str) -> None:
    with pytest.raises(RecipeError, match=f'Did you mean "{nearest}"'):
        output(command, name)


# --- docs/models.md -----------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def block(language: str, number: int = 0) -> str:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)[number]


def test_page_names_every_fusion_projector_and_template() -> None:
    for name in FUSIONS:
        assert f"**{name}**" in PAGE
    for name in [*PROJECTORS, *CHAT_TEMPLATES]:
        assert f"`{name}`" in PAGE


def test_fusion_of_the_page_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("manyeyes.fusion.average")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(block("python"), "average.py", "exec"), module.__dict__)
    monkeypatch.setitem(FUSIONS, "average", module.ROW)
    fusion = build_fusion("average", encoder_channels=[8, 6], grid=4, options={"align_corners": True})
    features = [torch.randn(2, 8, 4, 4), torch.randn(2, 6, 12, 12)]
    fused = fusion(features)
    assert fused.shape == (2, fusion.num_tokens, fusion.channels) == (2, 16, 8)
    assert "align_corners" in output(fusions_command, "average")


def test_rendering_of_the_page_is_what_the_command_prints(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    record.write_text(block("json"), encoding="utf-8")
    command = shlex.split(block("sh"))
    assert command[:3] == ["manyeyes", "chat", "render"]
    arguments = [str(record) if word == "record.json" else word for word in command[3:]]
    assert output(render_command, *arguments) == block("text")
