"""The view of a sweep in Weights & Biases: its cells grouped by k and N, with the panels that a scaling law needs.

Made with wandb-workspaces, an optional package: without it a sweep is logged all the same.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from saescale.storage.columns import COLUMNS, columns_of
from saescale.trainers.loggers.wandb_client import import_wandb, one_line, server, warn

_MOST_RUNS = 200  # lines in one panel; W&B's own default of 10 would hide most of a grid


class Arms(NamedTuple):
    """The architectures of a sweep: `colours` (#rrggbb) in the order of its figures, and the `runs` (ids) of each."""

    colours: Mapping[str, str]
    runs: Mapping[str, str]


_NO_ARMS = Arms({}, {})


def save_workspace(entity: str, project: str, sweep: str, figures: Sequence[str], arms: Arms = _NO_ARMS) -> str | None:
    """Makes the view of `sweep` where it is not there yet, and returns its address.

    figures: keys of figures of the summary run. arms: what its cells are coloured by, where it has several
    architectures. A view that is there stays as it is: its readers may have arranged it.
    None, with a warning that says what to do, where wandb-workspaces is not installed or the server refuses. Raises
    nothing.
    """
    import_wandb()
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError:
        warn("no workspace view is made: it takes wandb-workspaces (pip install 'saescale[workspaces]')")
        return None
    try:
        # One name for a sweep, so that a second analysis finds the view of the first.
        name = hashlib.sha256(f"{project}/{sweep}".encode()).hexdigest()[:11]
        url = f"{server().app_url}/{entity}/{project}?nw={name}"
        if not _exists(ws, url):
            workspace = describe_workspace(ws, entity, project, sweep, figures, arms)
            workspace._internal_name = f"nw-{name}-v"
            workspace.save()
        return url
    except Exception as error:
        warn(f"no workspace view is made: {one_line(error)}")
        return None


def describe_workspace(
    ws: Any, entity: str, project: str, sweep: str, figures: Sequence[str], arms: Arms = _NO_ARMS
) -> Any:
    """The view as wandb-workspaces' `Workspace`: nmse on logarithmic axes, latents, throughput, and the laws.

    ws: the module wandb_workspaces.workspaces. Of several architectures each run has the colour that its architecture
    has in every figure, and so has its group. Panels that W&B sorts, it sorts by name.
    """
    from wandb_workspaces.reports.v2 import LinePlot, MediaBrowser

    def line(title: str, metric: str, x: str = "tokens", log_x: bool = False, log_y: bool = False) -> Any:
        return LinePlot(
            title=title, x=x, y=[metric], log_x=log_x, log_y=log_y, title_x=COLUMNS[x].title, title_y=metric
        )

    sections = [
        ws.Section(
            name="nmse",
            panels=[
                line("Held-out nmse against compute", "nmse", "flops", log_x=True, log_y=True),
                line("Held-out nmse against tokens", "nmse", log_x=True, log_y=True),
                line("Training nmse against tokens", "train_nmse", log_x=True, log_y=True),
            ],
            is_open=True,
        ),
    ]
    shown = [column for column in columns_of("curves") if column.panel]
    for name in dict.fromkeys(column.panel for column in shown):
        panels = [line(column.title, column.name) for column in shown if column.panel == name]
        sections.append(ws.Section(name=name, panels=panels, is_open=True))
    if figures:
        panels = [MediaBrowser(title=key.removeprefix("figures/"), media_keys=[key], num_columns=1) for key in figures]
        sections.insert(0, ws.Section(name="Laws", panels=panels, is_open=True))
    first = ("architecture",) if arms.colours else ()
    # Groups have colours since wandb-workspaces 0.4.6 or so; before that the first run's.
    known = "group_colors" in getattr(ws.RunsetSettings, "__dataclass_fields__", {})
    of_groups = {"group_colors": dict(arms.colours)} if arms.colours and known else {}
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"{sweep}: scaling",
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="tokens", max_runs=_MOST_RUNS),
        runset_settings=ws.RunsetSettings(
            filters=ws.And(ws.Metric("Group") == sweep),
            groupby=[ws.Config(name) for name in (*first, "k", "n_latents")],
            order=[ws.Ordering(ws.Config(name)) for name in (*first, "n_latents")],
            run_settings={run: ws.RunSettings(color=arms.colours[name]) for run, name in arms.runs.items()},
            **of_groups,
        ),
    )


def _exists(ws: Any, url: str) -> bool:
    """Whether the view at `url` is there; what else goes wrong is raised."""
    try:
        ws.Workspace.from_url(url)
    except ValueError as error:
        if "not found in project" in str(error):
            return False
        raise
    return True
