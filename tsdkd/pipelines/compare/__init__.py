"""Several methods from one start, on the same prompts and the same budget, one row each; an interrupted comparison goes on."""

from tsdkd.pipelines.compare.runs import Run, compare, labelled, runs_of
from tsdkd.pipelines.compare.scoring import OnProblems, OnTasks, Samples, Scorer
from tsdkd.pipelines.compare.table import table

__all__ = ["OnProblems", "OnTasks", "Run", "Samples", "Scorer", "compare", "labelled", "runs_of", "table"]
