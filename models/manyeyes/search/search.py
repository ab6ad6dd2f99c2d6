"""``search.json``: a search for the best set of encoders, round by round.

Eagle's round robin (arXiv:2408.15998): from a start set, each round trains every remaining encoder added to the best
set so far; the best mean of normalised scores wins the round, and the search ends when nothing is gained.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from manyeyes.errors import PipelineError
from manyeyes.pages import duration, span
from manyeyes.search.trial import Difference, Trial, by_name, difference, read_trial, render_trials
from manyeyes.search.variant import Variant
from manyeyes.strict import StrictModel

SEARCH_FILE = "search.json"
# A Kubeflow pipeline cannot grow while it runs: it has a fixed number of rounds, and those after the end do nothing.
MAX_ROUNDS = 5


class SearchRound(StrictModel):
    """One round."""

    number: int = Field(description="0 scores the start set.")
    candidates: tuple[str, ...] = Field(description="Keys of the sets that were scored, best first.")
    chosen: str | None = Field(description="Key of the set that won; null when none gained enough.")
    gain: float | None = Field(description="Mean score of the best minus that of the set before; points.")
    gain_ci95: tuple[float, float] | None = Field(description="95% interval of gain, paired; points.")


class Search(StrictModel):
    """A search as far as it is."""

    format_version: Literal[1] = Field(default=1, description="Version of this file's format.")
    recipe: str = Field(description="Name of the recipe whose encoders are searched.")
    pool: tuple[str, ...] = Field(description="All encoders, in the recipe's order.")
    start: tuple[str, ...] = Field(description="The start set.")
    max_rounds: int = Field(description="Rounds after the start set's.")
    min_gain: float = Field(description="Points that a round must gain.")
    rounds: tuple[SearchRound, ...] = Field(default=(), description="Rounds that are over.")
    ended: str | None = Field(default=None, description="Why the search ended; null while it goes on.")

    @property
    def best(self) -> str | None:
        """Key of the best set so far."""
        chosen = [round_.chosen for round_ in self.rounds if round_.chosen is not None]
        return chosen[-1] if chosen else None

    def next_sets(self, best: Sequence[str]) -> list[Variant]:
        """The sets of the next round: ``best`` with each remaining encoder added, in the recipe's order."""
        if not self.rounds:
            return [Variant(encoders=self.start)]
        remaining = [name for name in self.pool if name not in best]
        return [
            Variant(encoders=tuple(name for name in self.pool if name in best or name == added)) for added in remaining
        ]


def read_search(folder: Path) -> tuple[Search, dict[str, Trial]]:
    """A search, and its trials by key.

    Raises:
        PipelineError: Missing, or not a search's folder.
    """
    search = _read_state(folder)
    keys = [key for round_ in search.rounds for key in round_.candidates]
    return search, {key: read_trial(trial_folder(folder, key)) for key in keys}


def write_search(search: Search, folder: Path) -> None:
    """Write ``search.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SEARCH_FILE).write_text(search.model_dump_json(indent=2) + "\n", encoding="utf-8")


def trial_folder(search: Path, key: str) -> Path:
    """Where a search keeps a trial."""
    return search / "trials" / key


def close_round(search: Search, before: Path, trials: Mapping[str, Path]) -> Search:
    """The search after the trials of one more round.

    Args:
        search: So far.
        before: Its folder, for the answers of the best set so far.
        trials: Folders of this round's trials, by key.
    """
    scored = {key: read_trial(folder) for key, folder in trials.items()}
    # Of equal scores the smaller model wins.
    ranking = sorted(scored, key=lambda key: (-scored[key].mean, scored[key].parameters, key))
    winner, number = ranking[0], len(search.rounds)
    if search.best is None:
        round_ = SearchRound(number=number, candidates=tuple(ranking), chosen=winner, gain=None, gain_ci95=None)
    else:
        gained = difference(trials[winner], trial_folder(before, search.best))
        chosen = winner if gained.mean > search.min_gain else None
        round_ = SearchRound(
            number=number,
            candidates=tuple(ranking),
            chosen=chosen,
            gain=round(gained.mean, 4),
            gain_ci95=gained.ci95,
        )
    best = scored[winner].encoders
    ended = None
    if round_.chosen is None:
        ended = f"round {number} gained {round_.gain:+.2f} points, not more than {search.min_gain:g}"
    elif len(best) == len(search.pool):
        ended = "every encoder is in the set"
    elif number >= search.max_rounds:
        ended = f"{search.max_rounds} round{'s were' if search.max_rounds != 1 else ' was'} asked for"
    return search.model_copy(update={"rounds": (*search.rounds, round_), "ended": ended})


def gains(search: Search, folder: Path) -> dict[str, Difference]:
    """Each set's mean score minus that of the set that it was made from, by key."""
    found: dict[str, Difference] = {}
    before: str | None = None
    for round_ in search.rounds:
        if before is not None:
            for key in round_.candidates:
                found[key] = difference(trial_folder(folder, key), trial_folder(folder, before))
        before = round_.chosen or before
    return found


def copy_trials(trials: Mapping[str, Path], folder: Path) -> None:
    """Keep trials in a search's folder."""
    for key, source in trials.items():
        shutil.copytree(source, trial_folder(folder, key), dirs_exist_ok=True)


def _read_state(folder: Path) -> Search:
    path = folder / SEARCH_FILE
    try:
        return Search.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise PipelineError(
            f"{path} cannot be read ({error})", "what the steps of a search write", "Run the search again."
        ) from error


def search_html(
    search: Search, trials: Mapping[str, Trial], differences: Mapping[str, Difference], *, seed: int
) -> str:
    """The whole page.

    Args:
        search: As far as it is.
        trials: By key.
        differences: To the set before, by key.
        seed: Of the recipe.
    """
    assert search.best is not None
    ladder = [round_.chosen for round_ in search.rounds if round_.chosen is not None]
    best, first = trials[search.best], trials[ladder[0]]
    everything = [key for round_ in search.rounds for key in round_.candidates]
    return render_trials(
        "search.html",
        title=f"Best set of encoders: {' + '.join(best.encoders)}",
        search=search,
        seed=seed,
        tiles=[
            (f"{best.mean:.2f}%", "mean score of the best set", span(best.mean_ci95)),
            (f"{best.mean - first.mean:+.2f}", "points over the start set", " + ".join(first.encoders)),
            (f"{best.visual_tokens:,}", "visual tokens", f"{first.visual_tokens:,} with the start set"),
            (f"{len(trials)}", "sets trained and scored", duration(sum(t.train_seconds for t in trials.values()))),
        ],
        rungs=by_name(trials, differences, ladder, search.best),
        rounds=[(round_, by_name(trials, differences, round_.candidates, round_.chosen)) for round_ in search.rounds],
        everything=by_name(trials, differences, everything, search.best),
    )


def search_markdown(search: Search, trials: Mapping[str, Trial], differences: Mapping[str, Difference]) -> str:
    """The ladder in short, for Kubeflow's run page."""
    assert search.best is not None
    return render_trials(
        "search.md",
        search=search,
        best=trials[search.best],
        rounds=[(round_, by_name(trials, differences, round_.candidates, round_.chosen)) for round_ in search.rounds],
    )
