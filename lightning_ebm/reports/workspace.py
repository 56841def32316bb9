"""A saved view of a project in Weights & Biases: a few charts in a few sections, the most telling ones first.

The view names keys, not runs, so it suits every run of the project that has both callbacks; runs are drawn in groups.
It is built by the library `wandb-workspaces`, which comes with ``lightning-ebm[workspace]``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_ebm.errors import ConfigurationError

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

STEP = "trainer/global_step"


@dataclass(frozen=True)
class Chart:
    """One chart of lines.

    Args:
        title: what the reader sees.
        keys: one line each.
        each: a prefix instead; every key under it is a line.
        log: whether the axis of the values is logarithmic.
    """

    title: str
    keys: tuple[str, ...] = ()
    each: str = ""
    log: bool = False


KEY_FIGURES = (
    Chart("Angle to the true gradient, degrees", ("alignment/angle_deg",), log=True),
    Chart("Residual: force that is left", ("ebm/residual",), log=True),
    Chart("Relaxation steps", ("ebm/steps",)),
)
SECTIONS = {
    "Layer by layer": (
        Chart("Cosine of each layer", each="alignment/layer/cosine/"),
        Chart("Angle of each layer, degrees", each="alignment/layer/angle_deg/", log=True),
        Chart("Residual of each layer", each="ebm/residual/layer/", log=True),
        Chart("From backprop (0) to equilibrium (1)", each="ebm/toward_equilibrium/layer/"),
    ),
    "Direction and size of the update": (
        Chart("Cosine to the true gradient", ("alignment/cosine",)),
        Chart("Relative error", ("alignment/relative_error",), log=True),
        Chart("Norm over the true norm", ("alignment/norm_ratio",)),
        Chart("Elements of equal sign", ("alignment/sign_agreement",)),
        Chart("Dead parameters", ("alignment/dead",)),
    ),
    "Relaxation": (
        Chart("Energy, free and nudged", ("ebm/energy_free", "ebm/energy_nudged")),
        Chart("Part of the fall made, and of the way to equilibrium", ("ebm/relaxed", "ebm/toward_equilibrium")),
        Chart("Largest residual of a sample", ("ebm/residual_max",), log=True),
        Chart("Steps that made 99 % of the fall", ("ebm/effective_steps",)),
        Chart("Step size", ("ebm/step_size",)),
        Chart("Largest curvature met", ("ebm/curvature",)),
        Chart(
            "Curvature where the update was read",
            ("ebm/curvature_smallest", "ebm/curvature_largest", "ebm/curvature_loss"),
        ),
    ),
}
PICTURES = ("alignment/heatmap", "ebm/energy_curves")
TABLES = ("alignment/table", "ebm/curves")
TASK = ("val/accuracy", "val/loss", "train/loss")  # of the recipes


def workspace(
    entity: str, project: str, metrics: Sequence[str] = TASK, name: str = "How the updates were found"
) -> "Workspace":
    """The view, not saved yet: ``workspace("team", "project").save()`` asks the server to.

    Args:
        entity: who owns the project, a team or a user.
        project: whose runs are shown.
        metrics: what your module logs; each is a chart of the first section.
        name: of the view.

    Raises:
        ConfigurationError: `wandb-workspaces` is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ConfigurationError(
            "A workspace is built by the library wandb-workspaces, which is not installed:"
            " pip install 'lightning-ebm[workspace]'."
        ) from error

    def drawn(chart: Chart) -> panels.LinePlot:
        pattern = f"^{re.escape(chart.each)}" if chart.each else None
        return panels.LinePlot(
            title=chart.title, x=STEP, y=list(chart.keys), metric_regex=pattern, log_y=chart.log, title_x="step"
        )

    first = [Chart(metric, (metric,)) for metric in metrics]
    sections = [ws.Section(name="Key figures", panels=[*map(drawn, (*first, *KEY_FIGURES))], is_open=True, pinned=True)]
    sections += [ws.Section(name=title, panels=[*map(drawn, charts)]) for title, charts in SECTIONS.items()]
    shown = [panels.MediaBrowser(title=key, media_keys=[key], num_columns=1) for key in PICTURES]
    tables = [panels.WeavePanelSummaryTable(table_name=key) for key in TABLES]
    sections.append(ws.Section(name="Pictures and tables", panels=[*shown, *tables]))
    settings = ws.RunsetSettings(groupby=[ws.Metric("Group")])
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, runset_settings=settings)
