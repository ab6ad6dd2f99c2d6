"""The page of a search: the ladder of sets, from the start set to the best."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from manyeyes.evaluation.page import page
from manyeyes.steps.report import heading, section
from manyeyes.steps.search import Search
from manyeyes.steps.trial import Difference, Trial
from manyeyes.steps.trial_page import (
    by_name,
    difference_strips,
    duration,
    fine_print,
    markdown_trials,
    score_bars,
    span,
    tiles,
    trials_table,
)

_SELECTION = (
    "Each set is compared with the set before it on the same questions (paired, clustered by image, 95%). The winner "
    "of a round is the best of several, so its gain is flattered: score the final set again with another seed before "
    "you rely on a small gain."
)


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
    state = f"Ended: {search.ended}." if search.ended else f"Going on: {len(search.rounds)} rounds are over."
    figures = [
        (f"{best.mean:.2f}%", "mean score of the best set", span(best.mean_ci95)),
        (f"{best.mean - first.mean:+.2f}", "points over the start set", " + ".join(first.encoders)),
        (f"{best.visual_tokens:,}", "visual tokens", f"{first.visual_tokens:,} with the start set"),
        (f"{len(trials)}", "sets trained and scored", f"{duration(sum(t.train_seconds for t in trials.values()))}"),
    ]
    parts = [
        heading(f"Best set of encoders: {' + '.join(best.encoders)}", ""),
        f'<p class="quiet">Recipe {escape(search.recipe)}, seed {seed}. {escape(state)}</p>',
        tiles(figures),
    ]
    rungs = by_name(trials, differences, ladder, search.best)
    parts.append(
        section("The ladder", score_bars(rungs) + trials_table(rungs, name="set", compared_with="the rung below"))
    )
    for round_ in search.rounds:
        rows = by_name(trials, differences, round_.candidates, round_.chosen)
        title = "Start set" if round_.number == 0 else f"Round {round_.number}: one encoder more"
        body = score_bars(rows)
        if round_.number:
            body += difference_strips(rows) + trials_table(rows, name="set", compared_with="the set before")
            if round_.chosen is None:
                body += f"<p>No set of this round was taken: {escape(search.ended or '')}.</p>"
        parts.append(section(title, body))
    everything = [key for round_ in search.rounds for key in round_.candidates]
    parts.append(f'<p class="quiet">{_SELECTION}</p>')
    parts.append(fine_print(by_name(trials, differences, everything, search.best)))
    return page(f"Search: {' + '.join(best.encoders)}", "\n".join(parts))


def search_markdown(search: Search, trials: Mapping[str, Trial], differences: Mapping[str, Difference]) -> str:
    """The ladder in short, for Kubeflow's run page."""
    assert search.best is not None
    best = trials[search.best]
    lines = [f"**{' + '.join(best.encoders)}**: {best.mean:.2f}% ({span(best.mean_ci95)})", ""]
    lines.append(f"Ended: {search.ended}." if search.ended else "The search goes on.")
    for round_ in search.rounds:
        rows = by_name(trials, differences, round_.candidates, round_.chosen)
        lines += ["", f"Round {round_.number}", "", markdown_trials(rows, name="set", compared_with="the set before")]
    return "\n".join(lines)
