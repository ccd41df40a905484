"""What `graded.yaml` calls: the library's grader as a score of lm-evaluation-harness."""

from tsdkd.data.answers import is_correct


def grade(doc, results):
    """1 or 0 for a response."""
    return {"accuracy": float(is_correct(results[0], doc["answer"]))}
