"""Why a job failed, from the end of its log."""

import re

_SAID = ("error: ", "unexpected ")
_LACKS = re.compile(r"^(?:ModuleNotFoundError|ImportError): No module named '([\w.]+)'")
_NO_PROGRAM = re.compile(r"(?:not found|No such file or directory|Permission denied)\s*$")
_EXCEPTION = re.compile(r"^[\w.]+(?:Error|Exception|Interrupt|Warning|Exit)\b.*")


def reason(text: str, python: str = "python") -> str | None:
    """One line on why what printed `text` at its end failed: what saescale said, else Python, the shell or Ray.

    `python`: the interpreter that it was started with. None where there is no text.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if said := [line for line in lines if line.startswith(_SAID)]:
        return said[-1].removeprefix("error: ")
    if lacking := [match[1] for line in lines if (match := _LACKS.match(line))]:
        return (
            f"the cluster's {python} lacks the module {lacking[-1].partition('.')[0]}; install what saescale needs "
            "there (pip install saescale), or name the interpreter that has it: saescale submit --python PATH"
        )
    if lines and python in lines[-1] and _NO_PROGRAM.search(lines[-1]):
        return (
            f"the cluster cannot start {python} ({lines[-1][-200:]}); name an interpreter that it has: saescale submit "
            "--python PATH"
        )
    raised = [line for line in lines if _EXCEPTION.match(line)]
    last = raised[-1:] or lines[-1:]
    return last[0][:500] if last else None
