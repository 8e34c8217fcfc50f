"""Measured quality: which method answers how well at which budget.

An `Evaluation` is a plan of cells (protocol x task x seed x method x budget). `run` computes them, in several
processes if asked, writes a file for each, and resumes where it was interrupted; `summarise` makes the tables.
A task is one small interface, `Task`: a name, a metric, and examples with messages and answers.
"""

from kvweave.evals.plan import PROTOCOLS, Cell, Evaluation
from kvweave.evals.run import run
from kvweave.evals.tables import summarise, write_tables
from kvweave.evals.tasks import Example, LabTask, Task, lab_tasks

__all__ = [
    "PROTOCOLS",
    "Cell",
    "Evaluation",
    "Example",
    "LabTask",
    "Task",
    "lab_tasks",
    "run",
    "summarise",
    "write_tables",
]
