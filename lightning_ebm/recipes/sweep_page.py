"""The page of a sweep: its trials, and Optuna's pictures of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ebm.reports import pages

if TYPE_CHECKING:
    from optuna import Study


def write(study: "Study", title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], path: Path) -> Path:
    """Writes it, with the code of its pictures in it.

    Args:
        study: whose trials there are.
        title: of the page.
        headers: of the table.
        rows: its lines, the best trial first.
        path: of the page.
    """
    trials = pages.Table(list(headers), [list(row) for row in rows])
    figures = [(name, pages.drawn(figure)) for name, figure in _figures(study)]
    path.write_text(pages.render("sweep.html", title=title, command="sweep", trials=trials, figures=figures))
    return path


def _figures(study: "Study") -> list[tuple[str, Any]]:
    """Optuna's, as far as the trials that have a value tell."""
    from optuna import visualization
    from optuna.trial import TrialState

    complete = study.get_trials(states=[TrialState.COMPLETE])
    varied = [name for name in (complete[0].params if complete else ()) if len({t.params[name] for t in complete}) > 1]
    if not varied:
        return []
    found = [
        ("Each trial, and the best so far", visualization.plot_optimization_history(study)),
        ("Every parameter alone", visualization.plot_slice(study, varied)),
    ]
    if len(varied) > 1:
        found.append(("All together", visualization.plot_parallel_coordinate(study, varied)))
        if len(complete) > 3 and len({trial.value for trial in complete}) > 1:
            found.append(("What matters (fANOVA)", visualization.plot_param_importances(study, params=varied)))
    return found
