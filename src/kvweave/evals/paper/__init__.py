"""The papers' tables and figures, each by one command: `kvweave paper flowmm:table1`.

A `Recipe` (all are in `recipes.py`) says which methods, budgets and tasks a table needs; `make` computes what is
missing in the results folder that all tables share, lays it out as a `Sheet`, and writes it as JSON, Markdown and a
picture.
"""

from kvweave.evals.paper.make import make
from kvweave.evals.paper.recipe import Recipe
from kvweave.evals.paper.recipes import RECIPES, find
from kvweave.evals.paper.sheet import Sheet, Table
from kvweave.evals.paper.subject import Subject

__all__ = ["RECIPES", "Recipe", "Sheet", "Subject", "Table", "find", "make"]
