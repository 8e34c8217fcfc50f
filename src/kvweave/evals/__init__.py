"""Measured quality: which method answers how well at which budget.

An `Evaluation` is a plan of cells (protocol x task x seed x method x budget). `run` computes them, in several
processes if asked, writes a file for each, sample by sample, and resumes where it was interrupted; `summarise` makes
the tables. A task is one small interface, `Task`: a name, metrics, and examples with messages and answers;
`lab_tasks` draws them, `milebench_tasks` reads them from a disk.
"""

from kvweave.evals.run.plan import PROTOCOLS, Cell, Evaluation
from kvweave.evals.run.worker import run
from kvweave.evals.tables.tables import summarise, write_tables
from kvweave.evals.tasks.milebench import MileBenchTask, Options, milebench_tasks
from kvweave.evals.tasks.tasks import Example, LabTask, Task, lab_tasks

__all__ = [
    "PROTOCOLS",
    "Cell",
    "Evaluation",
    "Example",
    "LabTask",
    "MileBenchTask",
    "Options",
    "Task",
    "lab_tasks",
    "milebench_tasks",
    "run",
    "summarise",
    "write_tables",
]
