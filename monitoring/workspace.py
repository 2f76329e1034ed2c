"""Evidently's workspace: one run per window on the dashboard of the project "perennial"."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from monitoring.report import METHOD
from monitoring.verdicts import DriftVerdict
from stages.common.artifacts import STATE, make_folder, read_json, write_json
from stages.common.logs import set_quiet_environment

if TYPE_CHECKING:
    from evidently.core.report import Snapshot
    from evidently.ui.workspace import Project, Workspace

WORKSPACE = STATE / "evidently"
PROJECT = "perennial"
MAX_RUNS = 100  # kept in the workspace: its page reads all of them when it starts
PANELS = "1"  # another number, and the dashboard of an older workspace is replaced


def add_to_workspace(root: Path, verdict: DriftVerdict, snapshot: Snapshot) -> str:
    """Add a report to the workspace, in the place of an older one on the same window; return the run's id.

    Runs beyond `MAX_RUNS` go, the oldest first; their pages under `reports/watch` stay.
    """
    set_quiet_environment()
    from evidently.ui.workspace import Workspace

    make_folder(root / WORKSPACE)
    workspace = Workspace.create(str(root / WORKSPACE))
    project = _project(workspace)
    index_path = root / WORKSPACE / "runs.json"
    index: dict[str, str] = read_json(index_path) if index_path.exists() else {}
    stored = {str(run) for run in workspace.list_runs(project.id)}
    for old in [index.pop(verdict.id, None), *_oldest(index, MAX_RUNS - 1)]:
        if old in stored:
            workspace.delete_run(project.id, old)
    for result in snapshot.metric_results.values():
        result.widget = []  # the table above them holds the same pictures: half of the file
    run = workspace.add_run(project.id, snapshot, include_data=False)
    index[verdict.id] = str(run.id)
    write_json(index_path, index)
    return str(run.id)


def _oldest(index: dict[str, str], keep: int) -> list[str]:
    """Take the oldest windows (their names start with their time) out of the index; return their runs."""
    return [index.pop(name) for name in sorted(index)[: max(0, len(index) - keep)]]


def _project(workspace: Workspace) -> Project:
    description = f"What production is asked and answers, window by window (panels {PANELS})"
    found = [project for project in workspace.list_projects() if project.name == PROJECT]
    if found and found[0].description == description:
        return found[0]
    if found:
        project = found[0]
        project.description = description
        project.save()
        for tab in [tab.title for tab in project.dashboard.model().tabs]:
            project.dashboard.delete_tab(tab)
    else:
        project = workspace.create_project(PROJECT, description)
    _lay_out(project)
    return project


def _lay_out(project: Project) -> None:
    from evidently.sdk.models import PanelMetric
    from evidently.sdk.panels import bar_plot_panel, counter_panel, line_plot_panel, text_panel

    def mean(column: str, legend: str) -> PanelMetric:
        return PanelMetric(legend=legend, metric="MeanValue", metric_labels={"column": column})

    drifted = PanelMetric(
        legend="columns", metric="DriftedColumnsCount", metric_labels={"value_type": "count"}
    )
    rows = PanelMetric(legend="requests", metric="RowCount")
    slow = PanelMetric(
        legend="95th percentile, s", metric="QuantileValue", metric_labels={"column": "total_s"}
    )
    effects = PanelMetric(legend="{{column}}", metric="ValueDrift", metric_labels={"method": METHOD})
    for panel in (
        text_panel(
            "Drift of production",
            "Each point is a window of traffic next to the champion's first requests. Whether a column "
            "drifted is Perennial's verdict; Evidently draws.",
        ),
        counter_panel("Drifted columns, latest window", [drifted], size="half"),
        counter_panel("Requests, latest window", [rows], size="half"),
        line_plot_panel("Effect of each column (0: unchanged, 1: nothing in common)", [effects]),
        bar_plot_panel("Drifted columns", [drifted], size="half"),
        bar_plot_panel("Requests", [rows], size="half"),
        line_plot_panel("Valid output", [mean("valid_output", "share")], size="half"),
        line_plot_panel(
            "Feedback",
            [mean("thumb", "thumbs up, of thumbs"), mean("corrected", "corrected, of feedback")],
            size="half",
        ),
        line_plot_panel("Time to the end of the answer", [slow], size="half"),
        line_plot_panel("Errors of the server", [mean("failed", "share")], size="half"),
    ):
        project.dashboard.add_panel(panel)
