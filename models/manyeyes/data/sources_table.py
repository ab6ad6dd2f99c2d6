"""``SOURCES``: the data sets that LLaVA, Eagle, Cambrian-1 and Mini-Gemini are trained on, one row each.

A row says where a set is published, which columns it must have, how an item becomes turns, and which sentence about the
form of the answer Cambrian-1 puts behind its questions. Of Q-Instruct and IconQA, which ask with options and without,
the paper names two (prompts 1 and 3, and 1 and 10 of its appendix on the answer machine) and not which question gets
which: here the one about letters stands where the answer is an option's letter, the other elsewhere. Rows without a hub
id have no public home that is known; such samples come in the papers' own mixtures, and their names are known here for
the sake of category and sentence.

Sources: LLaVA arXiv:2304.08485 and 2310.03744, Eagle arXiv:2408.15998, Cambrian-1 arXiv:2406.16860, Mini-Gemini
arXiv:2403.18814; licences as the hub's cards say. The Cauldron (arXiv:2405.02246) leaves them to each of its sets.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from manyeyes.data import source_items as items
from manyeyes.data.source_items import Row, SourceItem
from manyeyes.errors import DataError, did_you_mean

Category = Literal["General", "OCR", "Language", "Counting", "Math", "Code", "Science", "Captions"]
"""Cambrian-1's, and captions of a first stage."""

_LETTER_ANSWER = re.compile(r"(?:[Aa]nswer: *)?\(?[A-Z](?:$|[.):](?:\s|$))")
NOT_STATED = "not stated"

SHORT = "Answer the question using a single word or phrase."
NUMBER = "Answer the question using a single number or phrase."
OPTION = "Answer with the option's letter from the given choices directly."
DIRECT = "Give the short answer directly."
NO_ANSWER = "When the provided information is insufficient, respond with <no answer>."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
HTML = "Directly provide the HTML code."
REASON = "First show your reasoning process and then give the final answer."
LETTER = "Answer with the letter."

L1, L15, EAGLE, CAMBRIAN, GEMINI = "LLaVA", "LLaVA-1.5", "Eagle", "Cambrian-1", "Mini-Gemini"


@dataclass(frozen=True)
class DataSource:
    """One published data set.

    Attributes:
        title: As people call it.
        category: Of Cambrian-1's seven, or captions.
        samples: As the papers count it; 0 where they do not.
        used_by: The papers' systems that train on it.
        hub_id: Repository of the hub; empty where no public home is known.
        files: Glob of its data files there, the training split's.
        columns: What every item must have.
        read: How an item becomes images and turns.
        licence: SPDX name, ``other``, or ``not stated``.
        answer_format: Cambrian-1's sentence behind its questions; empty for none.
        letter_format: The sentence behind those whose answer is an option's letter, where it is another one.
        aliases: Other names in the papers' mixtures.
    """

    title: str
    category: Category
    samples: int
    used_by: tuple[str, ...]
    hub_id: str = ""
    files: str = ""
    columns: tuple[str, ...] = ("conversations",)
    read: Callable[[Row], SourceItem] = items.read_conversation
    licence: str = NOT_STATED
    answer_format: str = ""
    letter_format: str = ""
    aliases: tuple[str, ...] = ()


def _cauldron(
    title: str,
    category: Category,
    samples: int,
    used_by: tuple[str, ...],
    part: str,
    answer_format: str = "",
    aliases: tuple[str, ...] = (),
    letter_format: str = "",
) -> DataSource:
    return DataSource(
        title,
        category,
        samples,
        used_by,
        hub_id="HuggingFaceM4/the_cauldron",
        files=f"{part}/*.parquet",
        columns=("images", "texts"),
        read=items.read_cauldron,
        answer_format=answer_format,
        letter_format=letter_format,
        aliases=aliases,
    )


_LLAVA = "liuhaotian/LLaVA-Instruct-150K"
_SHAREGPT4V = "Lin-Chen/ShareGPT4V"
_ALLAVA = "FreedomIntelligence/ALLaVA-4V"
_CAMBRIAN = "nyu-visionx/Cambrian-10M"
_QUESTION_ANSWER = ("image", "question", "answer")

SOURCES: dict[str, DataSource] = {
    # Mixtures, and what the papers made themselves.
    "llava-1.5-mix665k": DataSource(
        "LLaVA-1.5 665k",
        "General",
        665_298,
        (L15, EAGLE, CAMBRIAN),
        files="llava_v1_5_mix665k.json",
        hub_id=_LLAVA,
        licence="CC-BY-4.0",
    ),
    "llava-instruct-150k": DataSource(
        "LLaVA-Instruct",
        "General",
        157_712,
        (L1, L15, EAGLE, CAMBRIAN, GEMINI),
        files="llava_instruct_150k.json",
        aliases=("llava150k", "llava"),
        hub_id=_LLAVA,
        licence="CC-BY-4.0",
    ),
    "llava-conversation-58k": DataSource(
        "LLaVA conversations",
        "General",
        58_000,
        (L1,),
        files="conversation_58k.json",
        hub_id=_LLAVA,
        licence="CC-BY-4.0",
    ),
    "llava-detail-23k": DataSource(
        "LLaVA descriptions", "General", 23_000, (L1,), files="detail_23k.json", hub_id=_LLAVA, licence="CC-BY-4.0"
    ),
    "llava-reasoning-77k": DataSource(
        "LLaVA reasoning",
        "General",
        77_000,
        (L1,),
        files="complex_reasoning_77k.json",
        hub_id=_LLAVA,
        licence="CC-BY-4.0",
    ),
    "llava-pretrain-558k": DataSource(
        "LLaVA-Pretrain",
        "Captions",
        558_000,
        (L15, EAGLE, CAMBRIAN, GEMINI),
        hub_id="liuhaotian/LLaVA-Pretrain",
        files="blip_laion_cc_sbu_558k.json",
        licence="other",
    ),
    "llava-cc3m-595k": DataSource(
        "CC3M as LLaVA filtered it",
        "Captions",
        595_000,
        (L1, EAGLE),
        hub_id="liuhaotian/LLaVA-CC3M-Pretrain-595K",
        files="chat.json",
        licence="other",
    ),
    "eagle-1.8m": DataSource(
        "Eagle-1.8M", "General", 1_800_000, (EAGLE,), hub_id="shi-labs/Eagle-1.8M", files="eagle-sft-v1-1_8m.json"
    ),
    "cambrian-10m": DataSource(
        "Cambrian-10M",
        "General",
        9_784_000,
        (CAMBRIAN,),
        files="jsons/Cambrian10M.jsonl",
        hub_id=_CAMBRIAN,
        licence="Apache-2.0",
    ),
    "cambrian-7m": DataSource(
        "Cambrian-7M, with its sentences about answers",
        "General",
        7_000_000,
        (CAMBRIAN, EAGLE),
        files="jsons/Cambrian7M_withsystemprompt.jsonl",
        hub_id=_CAMBRIAN,
        licence="Apache-2.0",
    ),
    "cambrian-737k": DataSource(
        "Cambrian-737k",
        "General",
        737_000,
        (CAMBRIAN,),
        files="jsons/Cambrian737k.jsonl",
        hub_id=_CAMBRIAN,
        licence="Apache-2.0",
    ),
    "cambrian-alignment": DataSource(
        "Cambrian-Alignment",
        "Captions",
        2_500_000,
        (CAMBRIAN, EAGLE),
        hub_id="nyu-visionx/Cambrian-Alignment",
        files="jsons/alignment_2.5m.jsonl",
    ),
    "cambrian-data-engine": DataSource(
        "Cambrian-1's data engine",
        "Science",
        161_000,
        (CAMBRIAN,),
        files="jsons/data_engine_161k.jsonl",
        aliases=("dataengine",),
        hub_id=_CAMBRIAN,
        licence="Apache-2.0",
    ),
    "cambrian-gpt4v": DataSource(
        "Answers rewritten by GPT-4V",
        "General",
        77_000,
        (CAMBRIAN,),
        files="jsons/gpt4v_77k.jsonl",
        aliases=("gpt4v", "gpt77k"),
        hub_id=_CAMBRIAN,
        licence="Apache-2.0",
    ),
    "cambrian-gpt4o": DataSource(
        "Long answers by GPT-4o",
        "General",
        60_000,
        (CAMBRIAN,),
        files="jsons/gpt4o_60k.jsonl",
        aliases=("gpt4o",),
        hub_id=_CAMBRIAN,
        licence="Apache-2.0",
    ),
    "mini-gemini-pretrain": DataSource(
        "Mini-Gemini pretraining", "Captions", 1_253_000, (GEMINI,), licence="CC-BY-NC-4.0"
    ),
    "mini-gemini-instruction": DataSource(
        "Mini-Gemini instructions",
        "General",
        1_500_000,
        (GEMINI,),
        hub_id="YanweiLi/MGM-Instruction",
        files="mgm_instruction.json",
        licence="CC-BY-NC-4.0",
    ),
    "mini-gemini-generation": DataSource(
        "Mini-Gemini drawing",
        "Language",
        13_000,
        (GEMINI,),
        hub_id="YanweiLi/MGM-Instruction",
        files="mgm_generation_pure_text.json",
        licence="CC-BY-NC-4.0",
        aliases=("mgm_generation_pure_text",),
    ),
    # General
    "sharegpt4v": DataSource(
        "ShareGPT4V",
        "General",
        100_000,
        (EAGLE, GEMINI),
        files="sharegpt4v_instruct_gpt4-vision_cap100k.json",
        hub_id=_SHAREGPT4V,
        licence="CC-BY-NC-4.0",
    ),
    "sharegpt4v-pt": DataSource(
        "ShareGPT4V-PT",
        "Captions",
        1_246_000,
        (CAMBRIAN,),
        files="share-captioner_coco_lcs_sam_1246k_1107.json",
        hub_id=_SHAREGPT4V,
        licence="CC-BY-NC-4.0",
    ),
    "laion-gpt4v": DataSource(
        "LAION-GPT4V",
        "General",
        11_000,
        (EAGLE, CAMBRIAN, GEMINI),
        hub_id="laion/gpt4v-dataset",
        files="data/train-*.parquet",
        columns=("link", "caption"),
        read=items.read_laion_gpt4v,
        licence="CC0-1.0",
    ),
    "allava": DataSource(
        "ALLaVA-Instruct",
        "General",
        700_000,
        (CAMBRIAN, GEMINI),
        files="allava_*/ALLaVA-Instruct-*.json",
        aliases=("allavainstruct",),
        hub_id=_ALLAVA,
        licence="Apache-2.0",
    ),
    "allava-caption": DataSource(
        "ALLaVA-Caption",
        "Captions",
        695_000,
        (GEMINI, CAMBRIAN),
        files="allava_*/ALLaVA-Caption-*.json",
        hub_id=_ALLAVA,
        licence="Apache-2.0",
    ),
    "lvis-instruct4v": DataSource(
        "LVIS-Instruct4V",
        "General",
        220_000,
        (EAGLE, CAMBRIAN),
        hub_id="X2FD/LVIS-Instruct4V",
        files="lvis_instruct4v_220k.json",
    ),
    "lrv-instruct": DataSource("LRV-Instruct", "General", 150_000, (EAGLE,)),
    "q-instruct": DataSource("Q-Instruct", "General", 400_000, (CAMBRIAN,), answer_format=SHORT, letter_format=OPTION),
    "lnqa": DataSource("LNQA", "General", 302_000, (CAMBRIAN,)),
    "visual-genome": DataSource("Visual Genome", "General", 86_417, (L15, EAGLE, CAMBRIAN, GEMINI), aliases=("vg",)),
    "vqav2": _cauldron("VQAv2", "General", 82_783, (L15, EAGLE, CAMBRIAN, GEMINI), "vqav2"),
    "gqa": DataSource("GQA", "General", 72_140, (L15, EAGLE, CAMBRIAN, GEMINI)),
    "a-okvqa": _cauldron("A-OKVQA", "General", 66_160, (L15, EAGLE, CAMBRIAN, GEMINI), "aokvqa"),
    "okvqa": _cauldron("OKVQA", "General", 8_998, (L15, EAGLE, CAMBRIAN, GEMINI), "okvqa"),
    "refcoco": DataSource("RefCOCO", "General", 48_447, (L15, EAGLE, CAMBRIAN, GEMINI)),
    "alfworld": DataSource("AlfWorld", "General", 45_000, (CAMBRIAN,)),
    "vizwiz": DataSource("VizWiz", "General", 20_000, (CAMBRIAN,), answer_format=f"{UNANSWERABLE} {SHORT}"),
    "visual7w": _cauldron("Visual7W", "General", 14_000, (EAGLE, CAMBRIAN), "visual7w", OPTION),
    "idk": DataSource("IDK", "General", 11_000, (CAMBRIAN,)),
    "hateful-memes": _cauldron("Hateful Memes", "General", 8_000, (CAMBRIAN,), "hateful_memes"),
    "oodvqa": DataSource("OODVQA", "General", 8_000, (CAMBRIAN,), answer_format=SHORT),
    "sketchyvqa": DataSource("SketchyVQA", "General", 8_000, (CAMBRIAN,), answer_format=SHORT),
    "visualmrc": _cauldron("VisualMRC", "General", 3_000, (CAMBRIAN,), "visualmrc"),
    # OCR: documents, charts, tables, text in scenes
    "dvqa": _cauldron("DVQA", "OCR", 775_000, (EAGLE, CAMBRIAN, GEMINI), "dvqa", SHORT),
    "synthdog-en": DataSource(
        "SynthDoG-EN",
        "OCR",
        500_000,
        (EAGLE, CAMBRIAN),
        hub_id="naver-clova-ix/synthdog-en",
        files="data/train-*.parquet",
        columns=("image", "ground_truth"),
        read=items.read_synthdog,
        aliases=("synthdog",),
    ),
    "arxivqa": DataSource(
        "ArxivQA",
        "OCR",
        100_000,
        (CAMBRIAN,),
        hub_id="MMInstruction/ArxivQA",
        files="arxivqa.jsonl",
        columns=("image", "question", "options", "label"),
        read=items.read_arxivqa,
        licence="CC-BY-SA-4.0",
    ),
    "ocr-vqa": _cauldron("OCR-VQA", "OCR", 80_000, (L15, EAGLE, CAMBRIAN, GEMINI), "ocrvqa"),
    "screenqa": DataSource("ScreenQA", "OCR", 79_000, (CAMBRIAN,), answer_format=f"{SHORT} {NO_ANSWER}"),
    "wikisql": _cauldron("WikiSQL", "OCR", 74_000, (CAMBRIAN,), "robut_wikisql", SHORT, ("robut_wikisql",)),
    "low-level-vision": DataSource("Low-Level Vision", "OCR", 50_000, (CAMBRIAN,)),
    "docvqa": _cauldron("DocVQA", "OCR", 39_000, (EAGLE, CAMBRIAN, GEMINI), "docvqa", DIRECT),
    "wtq": _cauldron("WTQ", "OCR", 38_000, (CAMBRIAN,), "robut_wtq", SHORT, ("robut_wtq",)),
    "chartqa": DataSource(
        "ChartQA",
        "OCR",
        28_299,
        (EAGLE, CAMBRIAN, GEMINI),
        hub_id="HuggingFaceM4/ChartQA",
        files="data/train-*.parquet",
        columns=("image", "query", "label"),
        read=items.read_chartqa,
        licence="GPL-3.0",
        answer_format=NUMBER,
    ),
    "iconqa": _cauldron("IconQA", "OCR", 27_000, (CAMBRIAN,), "iconqa", SHORT, letter_format=LETTER),
    "chart2text": _cauldron("Chart2Text", "OCR", 26_000, (CAMBRIAN,), "chart2text"),
    "tabmwp": _cauldron("TabMWP", "OCR", 23_000, (CAMBRIAN,), "tabmwp"),
    "textcaps": _cauldron("TextCaps", "OCR", 21_953, (L15, EAGLE, CAMBRIAN), "textcaps"),
    "llavar": DataSource("LLaVAR", "OCR", 20_000, (EAGLE, CAMBRIAN)),
    "st-vqa": _cauldron("ST-VQA", "OCR", 17_000, (CAMBRIAN,), "st_vqa"),
    "ai2d": _cauldron("AI2D", "OCR", 15_501, (EAGLE, CAMBRIAN, GEMINI), "ai2d", SHORT),
    "rendered-text": _cauldron("RenderedText", "OCR", 10_000, (CAMBRIAN,), "rendered_text"),
    "vistext": _cauldron("VisText", "OCR", 9_000, (CAMBRIAN,), "vistext"),
    "finqa": _cauldron("FinQA", "OCR", 6_000, (CAMBRIAN,), "finqa"),
    "infovqa": _cauldron("InfoVQA", "OCR", 2_000, (CAMBRIAN,), "infographic_vqa", aliases=("infographicvqa",)),
    "tat-qa": _cauldron("TAT-QA", "OCR", 2_000, (CAMBRIAN,), "tat_qa"),
    "hitab": _cauldron("HiTab", "OCR", 2_000, (CAMBRIAN,), "hitab", SHORT),
    # Counting
    "clevr": _cauldron("CLEVR", "Counting", 350_000, (CAMBRIAN,), "clevr", SHORT),
    "tallyqa": _cauldron("TallyQA", "Counting", 250_000, (CAMBRIAN,), "tallyqa", SHORT),
    # Code
    "websight": _cauldron("WebSight", "Code", 10_000, (CAMBRIAN,), "websight"),
    "datikz": _cauldron("DaTikz", "Code", 47_000, (CAMBRIAN,), "datikz"),
    "design2code": DataSource(
        "Design2Code",
        "Code",
        484,
        (CAMBRIAN,),
        hub_id="SALT-NLP/Design2Code-hf",
        files="data/train-*.parquet",
        columns=("image", "text"),
        read=items.read_code_of_page,
        licence="ODC-By",
        answer_format=HTML,
    ),
    # Math
    "geo170k": DataSource(
        "Geo170K", "Math", 170_000, (EAGLE, CAMBRIAN), hub_id="Luckyjhg/Geo170K", columns=("image", "conversations")
    ),
    "raven": _cauldron("RAVEN", "Math", 42_000, (CAMBRIAN,), "raven", SHORT),
    "geomverse": _cauldron("GeomVerse", "Math", 9_000, (CAMBRIAN,), "geomverse"),
    "mathvision": DataSource(
        "MATH-Vision",
        "Math",
        3_000,
        (CAMBRIAN,),
        hub_id="MathLLMs/MathVision",
        files="data/test-*.parquet",
        columns=("question", "options", "answer", "decoded_image"),
        read=items.read_mathvision,
    ),
    "inter-gps": _cauldron("Inter-GPS", "Math", 1_000, (CAMBRIAN,), "intergps", LETTER),
    "tqa": _cauldron("TQA", "Math", 1_000, (CAMBRIAN,), "tqa", LETTER),
    # Science
    "pathvqa": DataSource(
        "PathVQA",
        "Science",
        32_000,
        (CAMBRIAN,),
        hub_id="flaviagiammarino/path-vqa",
        files="data/train-*.parquet",
        columns=_QUESTION_ANSWER,
        read=items.read_question_answer,
        licence="MIT",
        answer_format=SHORT,
    ),
    "scienceqa": DataSource(
        "ScienceQA",
        "Science",
        12_726,
        (L1, CAMBRIAN),
        hub_id="derek-thomas/ScienceQA",
        files="data/train-*.parquet",
        columns=("image", "question", "choices", "answer"),
        read=items.read_scienceqa,
        licence="CC-BY-NC-SA-4.0",
    ),
    # Language
    "sharegpt": DataSource("ShareGPT", "Language", 40_688, (L15, EAGLE, CAMBRIAN, GEMINI)),
    "openorca": DataSource(
        "OpenOrca",
        "Language",
        994_000,
        (CAMBRIAN,),
        hub_id="Open-Orca/OpenOrca",
        files="1M-GPT4-Augmented.parquet",
        columns=("system_prompt", "question", "response"),
        read=items.read_openorca,
        licence="MIT",
    ),
    "mathinstruct": DataSource(
        "MathInstruct",
        "Language",
        262_000,
        (CAMBRIAN,),
        hub_id="TIGER-Lab/MathInstruct",
        files="MathInstruct.json",
        columns=("instruction", "output"),
        read=items.read_instruction,
        answer_format=REASON,
    ),
    "orca-math": DataSource(
        "Orca-Math",
        "Language",
        200_000,
        (CAMBRIAN,),
        hub_id="microsoft/orca-math-word-problems-200k",
        files="data/train-*.parquet",
        columns=("question", "answer"),
        read=items.read_question_answer,
        licence="MIT",
    ),
    "wizardcoder": DataSource("WizardCoder", "Language", 143_000, (CAMBRIAN,)),
    "opencodeinterpreter": DataSource(
        "OpenCodeInterpreter",
        "Language",
        66_000,
        (CAMBRIAN,),
        hub_id="m-a-p/Code-Feedback",
        columns=("messages",),
    ),
    "dolly": DataSource(
        "Dolly",
        "Language",
        11_000,
        (CAMBRIAN,),
        hub_id="databricks/databricks-dolly-15k",
        files="databricks-dolly-15k.jsonl",
        columns=("instruction", "context", "response"),
        read=items.read_instruction,
        licence="CC-BY-SA-3.0",
    ),
    "openhermes-2.5": DataSource(
        *("OpenHermes-2.5", "Language", 300_000, (EAGLE,)), hub_id="teknium/OpenHermes-2.5", files="openhermes2_5.json"
    ),
    "lima": DataSource(
        "LIMA",
        "Language",
        1_030,
        (GEMINI,),
        hub_id="GAIR/lima",
        files="train.jsonl",
        columns=("conversations",),
        read=items.read_lima,
    ),
}


def find_source(name: str) -> DataSource | None:
    """The row of a source by any of its names: ``tallyqa_250k.json`` and ``TallyQA`` are ``tallyqa``.

    Args:
        name: As a record or a file of a published mixture writes it.

    Returns:
        The row; None for a name that no row has.
    """
    return _BY_NAME.get(_plain(name)) or _BY_NAME.get(_plain(re.sub(r"[_-]\d+(\.\d+)?[km]?$", "", _stem(name))))


def describe_source(name: str) -> str:
    """All that a row says, for people.

    Raises:
        DataError: No row has that name.
    """
    row = find_source(name)
    if row is None:
        raise DataError(
            f'source is "{name}"',
            f"one of {', '.join(SOURCES)}",
            did_you_mean(name, SOURCES) or "List them with: manyeyes data sources",
        )
    summary = (row.read.__doc__ or "").partition("\n")[0]
    facts = {
        "title": row.title,
        "category": row.category,
        "samples": f"{row.samples:,}" if row.samples else "",
        "used by": ", ".join(row.used_by),
        "hub": f"{row.hub_id} {row.files}".strip() or "no public home that is known",
        "columns": ", ".join(row.columns),
        "becomes turns": summary.replace("``", ""),
        "licence": row.licence,
        "answer format": row.answer_format,
        "for a letter": row.letter_format,
    }
    return "\n".join(f"{fact:<14} {text}" for fact, text in facts.items() if text)


def add_answer_format(question: str, sentence: str) -> str:
    """The question with a sentence about the form of its answer behind it, unless it has it already."""
    return question if not sentence or sentence in question else f"{question.rstrip()}\n{sentence}"


def choose_sentence(answer: str, sentence: str, letter_sentence: str) -> str:
    """The sentence about the form of an answer.

    Args:
        answer: To the question.
        sentence: Of most questions.
        letter_sentence: Of those whose answer is an option's letter ("B", "(B)", "B. No", "Answer: B"); ``sentence``
            when empty.
    """
    return letter_sentence if letter_sentence and _LETTER_ANSWER.match(answer.strip()) else sentence


def _stem(name: str) -> str:
    return re.sub(r"\.jsonl?$", "", name.strip().lower())


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _stem(name))


_BY_NAME = {_plain(name): row for key, row in SOURCES.items() for name in (key, row.title, *row.aliases)}
