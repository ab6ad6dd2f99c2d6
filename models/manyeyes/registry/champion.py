"""The champion's evidence, made comparable where it was scored on other questions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import EvaluationError
from manyeyes.evaluation.answering.answerers import Answerer, BundleAnswerer
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.evaluation.scorecard import Scorecard, read_scorecard
from manyeyes.recipe import Recipe
from manyeyes.registry.gate import ChampionEvidence
from manyeyes.registry.pull import pull
from manyeyes.registry.references import (
    BUNDLE_SCORECARD,
    CHAMPION,
    EVIDENCE_PATH,
    ITEMS,
    ModelReference,
    download,
    find_alias,
    find_version,
)
from manyeyes.registry.tracking import connect


def champion_evidence(name: str, version: int | None = None, *, work_dir: Path) -> ChampionEvidence | None:
    """The champion's registered scorecard and items; ``None`` when there is no champion.

    Args:
        name: Of the registered model.
        version: The champion's, where it was found before; today's when left out.
        work_dir: The evidence is fetched to ``<work_dir>/champion-<version>``.

    Raises:
        RegistryError: No such version, or its files are gone.
        RegistryUnreachableError: The registry does not answer.
    """
    tracking = connect()
    if version is None:
        version = find_alias(tracking, name, CHAMPION)
    if version is None:
        return None
    found = find_version(tracking, ModelReference(name, None, version))
    folder = work_dir / f"champion-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    evidence = download(tracking, found, EVIDENCE_PATH, folder)
    scorecard = read_scorecard(evidence / BUNDLE_SCORECARD)
    return ChampionEvidence(version, scorecard.model.digest, scorecard, evidence / ITEMS)


def comparable_champion(
    name: str,
    *,
    scorecard: Scorecard,
    recipe: Recipe,
    snapshot: Snapshot,
    code_digest: str,
    work_dir: Path,
    make_answerer: Callable[[Path], Answerer] = BundleAnswerer,
) -> ChampionEvidence | None:
    """The champion's evidence on the challenger's questions.

    Where any benchmark digest differs, the champion's bundle is fetched and scored again. That is kept under
    ``work_dir`` and used again for the same champion, questions and code.

    Args:
        name: Of the registered model.
        scorecard: The challenger's (bundle).
        recipe: The challenger's; says what to ask and how long answers may be.
        snapshot: The challenger's.
        code_digest: Of the code that evaluates.
        work_dir: For what is fetched and made.
        make_answerer: Loads a bundle's folder.

    Raises:
        RegistryError: The champion's files are gone.
        RegistryUnreachableError: The registry does not answer.
        BundleError: The champion's bundle is not what was registered.
        EvaluationError: The challenger's questions are not those of this recipe and snapshot.
    """
    champion = champion_evidence(name, work_dir=work_dir)
    if champion is None or _same_questions(champion.scorecard, scorecard):
        return champion
    folder = work_dir / f"champion-{champion.version}"
    asked = "-".join(digest.rpartition(":")[2][:12] for digest in (snapshot.md5, recipe.digest, code_digest))
    # By digest and not by version: another store under the same name numbers its versions anew.
    out_dir = work_dir / f"rescored-{champion.bundle_digest[:12]}-{asked}"
    if (out_dir / "scorecard.json").is_file():
        anew = read_scorecard(out_dir / "scorecard.json")
    else:
        bundle = pull(name, champion.version, folder / "bundle")
        anew = evaluate(
            make_answerer(bundle),
            recipe,
            snapshot=snapshot,
            out_dir=out_dir,
            code_digest=code_digest,
            model_digest=champion.bundle_digest,
        )
    if not _same_questions(anew, scorecard):
        raise EvaluationError(
            "champion and challenger were asked different questions even now",
            "the scorecard of this recipe on this snapshot",
            "Evaluate the challenger again.",
        )
    return ChampionEvidence(champion.version, champion.bundle_digest, anew, out_dir / ITEMS, rescored=True)


def _same_questions(champion: Scorecard, challenger: Scorecard) -> bool:
    return all(
        name in champion.benchmarks and champion.benchmarks[name].benchmark_digest == score.benchmark_digest
        for name, score in challenger.benchmarks.items()
    )
