"""The page of a search: the ladder of sets, from the start set to the best."""

from __future__ import annotations

from collections.abc import Mapping

from manyeyes.pages import duration, span
from manyeyes.search.search import Search
from manyeyes.search.trial import Difference, Trial
from manyeyes.search.trial_page import by_name, render_trials


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
