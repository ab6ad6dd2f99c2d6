from __future__ import annotations

import json
from pathlib import Path

import pytest

from manyeyes.tokenizer_files import load_published_tokenizer
from tests.cli_calls import call
from tests.published_toys import write_sentencepiece
from tests.unit.test_runtime_templates import EXPECTED, TURNS, make_tokenizer

RECORD = {
    "id": "1",
    "image": "a.png",
    "conversations": [{"from": speaker, "value": text} for speaker, text in TURNS],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "record.json").write_text(json.dumps(RECORD), encoding="utf-8")
    make_tokenizer("<s>").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize("where", [".", "tokenizer.json"])
def test_json_has_text_ids_and_mask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, where: str
) -> None:
    assert (
        call(monkeypatch, "chat", "render", "vicuna_v1", "record.json", "--json", "--tokenizer", where, "--system", "S")
        == 0
    )
    shown = json.loads(capsys.readouterr().out)
    assert shown["text"] == "S USER: <image>\nQ ASSISTANT: A</s>USER: QQ ASSISTANT: AA</s>"
    expected = EXPECTED["vicuna_v1"][1].replace("I", "-200").split()
    assert shown["ids"] == [int(word.removeprefix("*")) for word in expected]
    assert shown["supervised"] == [word.startswith("*") for word in expected]
    assert [shown["text"][start:end] for start, end in shown["supervised_text"]] == [" A</s>", " AA</s>"]
    assert shown["image_spans"] == [[6, 1]]


def test_visual_tokens_may_be_as_many_as_the_model_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    options = ["--json", "--tokenizer", ".", "--image-tokens", "3", "--image-token-id", "0"]
    assert call(monkeypatch, "chat", "render", "chatml_direct", "record.json", *options) == 0
    shown = json.loads(capsys.readouterr().out)
    start, length = shown["image_spans"][0]
    assert shown["ids"][start : start + length] == [0, 0, 0]


def test_conversation_that_ends_with_a_question_gets_a_generation_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "turns.json").write_text(json.dumps(RECORD["conversations"][:1]), encoding="utf-8")
    assert call(monkeypatch, "chat", "render", "gemma", "turns.json", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["text"] == "<start_of_turn>user\n<image>\nQ<end_of_turn>\n<start_of_turn>model\n"
    assert "ids" not in shown


def test_list_of_records_gives_a_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "records.json").write_text(json.dumps([RECORD, RECORD]), encoding="utf-8")
    assert call(monkeypatch, "chat", "render", "mpt", "records.json", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_without_json_every_token_has_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert call(monkeypatch, "chat", "render", "chatml_direct", "record.json", "--tokenizer", ".") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines if " learned " in line] == ["'A'", "'<|im_end|>'", "'AA'", "'<|im_end|>'"]
    assert any(line.split()[:2] == ["-200", "'<image>'"] for line in lines)


def test_the_tokenizers_own_template_is_read_from_its_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}), encoding="utf-8")
    assert call(monkeypatch, "chat", "render", "tokenizer", "record.json", "--json", "--tokenizer", ".") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["text"] == "<s>[user]<image>\nQ</s>[assistant]A</s>[user]QQ</s>[assistant]AA</s>"
    assert sum(shown["supervised"]) == 4


@pytest.mark.parametrize(
    ("arguments", "content", "expected"),
    [
        (["vicuna"], RECORD, 'Did you mean "vicuna_v1"?'),
        (["tokenizer"], RECORD, "--tokenizer"),
        (["tokenizer", "--tokenizer", "tokenizer.json"], RECORD, "folder of a tokenizer"),
        (["mpt", "--tokenizer", "no.json"], RECORD, "no such file"),
        (["mpt", "--tokenizer", "empty"], RECORD, "has no tokenizer"),
        (["mpt", "--tokenizer", "given.json"], RECORD, "has no model"),
        (["mpt"], "no JSON", "given.json cannot be read"),
        (["mpt"], "[" * 100_000, "nested too deep"),
        (["mpt"], "9" * 5000, "cannot be read"),
        (["mpt"], {"conversation": []}, 'Did you mean "conversations"?'),
        (["mpt"], {"conversations": [{"from": "humen", "value": "Q"}]}, 'Did you mean "human"?'),
        (["mpt"], {"conversations": [{"from": "human"}]}, "from and value"),
        (["mpt"], {"conversations": []}, "is empty"),
        (["mpt"], {**RECORD, "image": ["a", "b"]}, "1 <image> and 2 images"),
        (["mpt", "--tokenizer", "."], {**RECORD, "image": ""}, "1 <image> and 0 images"),
        (["gemma", "--system", "S"], RECORD, "no place"),
    ],
)
def test_wrong_input_is_explained_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    arguments: list[str],
    content: object,
    expected: str,
) -> None:
    (folder / "given.json").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    assert call(monkeypatch, "chat", "render", arguments[0], "given.json", "--json", *arguments[1:]) == 2
    assert expected in capsys.readouterr().err


def test_missing_file_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert call(monkeypatch, "chat", "render", "mpt", "no.json") == 2
    assert "no.json" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["vicuna_v1"], ["tokenizer"]])
def test_folder_with_sentencepieces_model_alone_is_read_as_convert_reads_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "record.json").write_text(json.dumps(RECORD), encoding="utf-8")
    write_sentencepiece(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}",
        encoding="utf-8",
    )
    assert call(monkeypatch, "chat", "render", *arguments, "record.json", "--json", "--tokenizer", ".") == 0
    shown = json.loads(capsys.readouterr().out)
    converted = load_published_tokenizer(tmp_path)
    behind_image = shown["ids"][sum(shown["image_spans"][0]) :]
    behind_text = shown["text"].partition("<image>")[2]
    assert behind_image == converted(behind_text, add_special_tokens=False).input_ids
    assert (shown["ids"][0] == converted.bos_token_id) == (arguments == ["vicuna_v1"])
