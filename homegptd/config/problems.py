"""What can be wrong with a file, collected instead of raised one by one."""

from dataclasses import dataclass

MAX_PROBLEMS = 200


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to mend, where it stands."""

    file: str
    line: int
    """Counted from 1; 0 where the file as a whole is meant."""
    path: str
    """Dotted keys, items of lists in brackets; empty for faults of syntax."""
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return ": ".join(part for part in (place, self.path, self.message) if part)


class ConfigError(Exception):
    """A file that cannot be used. `problems` is never empty and sorted by line."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


class Enough(Exception):
    """Nothing more is worth reading: too many problems, or anchors that multiply."""


class Problems:
    """Collects problems of one file; `Enough` is raised past `MAX_PROBLEMS`."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._found: list[Problem] = []
        self._more = False

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, line: int, path: str, message: str) -> None:
        if len(self._found) == MAX_PROBLEMS:
            self._more = True
            raise Enough
        self._found.append(Problem(self.file, line, path, message))

    def error(self) -> ConfigError:
        found = sorted(self._found, key=lambda problem: problem.line)
        if self._more:
            found.append(Problem(self.file, 0, "", f"and more than these {MAX_PROBLEMS} problems"))
        return ConfigError(tuple(found))
