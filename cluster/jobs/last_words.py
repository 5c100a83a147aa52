"""Why a job failed, from the end of its log."""

import re

_SAID = ("error: ", "unexpected ")
_LACKS = re.compile(r"^(?:ModuleNotFoundError|ImportError): No module named '([\w.]+)'")
_NO_PROGRAM = re.compile(
    r"exit code 12[67]\b|: (?:not found|No such file or directory|Permission denied)$", re.MULTILINE
)
_RUNS = "Running entrypoint for job"  # how each log begins
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
    raised = [line for line in lines if _EXCEPTION.match(line)]
    if not raised and python in text and _NO_PROGRAM.search(text):  # in the words, or the code, of a shell
        return f"the cluster cannot start {python}; name an interpreter that it has: saescale submit --python PATH"
    told = raised or [line for line in lines if _RUNS not in line]
    return told[-1][:500] if told else None
