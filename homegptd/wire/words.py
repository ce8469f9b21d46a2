"""The words of the control protocol: what a member may say."""

from __future__ import annotations

from typing import Literal, TypeAlias

ModelStatus: TypeAlias = Literal["active", "sleeping", "switching", "error", "disabled", "stopped"]
PhaseWord: TypeAlias = Literal[
    "down", "starting", "asleep", "rousing", "roused", "waking", "awake", "draining",
    "falling-asleep", "stopping", "proving",
]  # fmt: skip
DaemonPhase: TypeAlias = Literal["bootstrap", "ready", "degraded", "stopping"]
OperationState: TypeAlias = Literal["running", "done", "failed", "cancelled"]
StepState: TypeAlias = Literal["waiting", "running", "done", "failed"]
Level: TypeAlias = Literal[1, 2]
LineLevel: TypeAlias = Literal["info", "warning", "error"]
FigureWord: TypeAlias = Literal["awake", "residue", "roused", "pinned", "host"]
SourceWord: TypeAlias = Literal["configured", "estimated", "measured"]
