"""The six reasoning styles (QR-Distill, Figure 2), how a path ends, and what the judge is asked."""

from __future__ import annotations

import re

from tsdkd.pipelines.templates import fields_of

# Figure 2; the field is called {question} here.
STYLES = {
    "vanilla": "Reason to solve the problem:\n{question}",
    "chain_of_thought": "{question}\n\nLet's reason step by step, writing each reasoning step clearly before giving the final"
    " answer.",
    "tree_of_thought": "Think in a tree of thoughts: outline multiple solution paths and choose the most promising one to"
    " derive the answer.\n{question}",
    "program": "Use code to solve the following problem and print the final answer.\n{question}",
    "fact_retrieval": "First retrieve some relevant facts from your knowledge, then use them to reason to the final answer.\n"
    "{question}",
    "backward": "Use forward reasoning to propose a candidate answer, then backward reasoning to verify it and provide the"
    " final verified answer.\n{question}",
}

SINGLE = "chain_of_thought"  # of the baselines' one path

# The paper says not how a path's answer is found; nothing is guessed out of running text here, so it is asked for.
ENDING = "\n\nEnd with a line: The answer is: ANSWER"
ANSWER = r"(?im)^[ \t>*_#]*the answer is[:*_ \t]*([^\n]+)$"

# The paper gives no prompt of the judge's.
JUDGE = """Below are a question and a reasoning path that reaches the right answer. Does the path contain hallucinated or \
spurious intermediate steps: invented facts, steps that do not follow, or an answer that does not follow from them?

Question:
{question}

Reasoning path:
{path}

Think briefly, then end with one line, "Verdict: valid" or "Verdict: invalid"."""

# What the paper's baselines ask a teacher for besides paths; the papers that they are from have longer prompts, with examples.
REQUESTS = {
    "rephrase": "Rephrase the following question in other words, so that its answer stays the same. Write the new question"
    " alone.\n{question}",
    "new_question": "Write a new question of the same kind as the following one, with another answer. Write the new question"
    " alone.\n{question}",
    "inverse": "Write the inverse of the following question: one that states its answer, and asks for something that the"
    " question states. Write the inverse question alone.\nQuestion: {question}\nAnswer: {answer}",
    "consistent": "Below are a question with its answer, and an inverse question with a reasoning path. Does the path's answer"
    ' agree with what the question states? End with one line, "Verdict: valid" or "Verdict: invalid".\n\nQuestion:\n{question}'
    "\nAnswer: {answer}\n\nInverse question:\n{inverse}\n\nReasoning path:\n{path}",
}
ANSWER_ALONE = "The answer is: {answer}"
MARKS = {"label": "[label] ", "rationale": "[rationale] ", "inverse": "[inverse] "}  # before a question: which task it is

_VERDICT = re.compile(r"(?im)^[ \t*_#>]*verdict[*_]*[ \t]*:[*_ \t]*(valid|invalid)[*_ \t]*\.?[ \t]*$")


def check_template(name: str, template: object, fields: set[str]) -> None:
    """Refuse a template that lacks a field, or has another.

    Raises:
        ValueError: naming them.
    """
    if not isinstance(template, str):
        raise ValueError(f"the template {name} must be a text, not {template!r}.")
    found = fields_of(template)
    if found != fields:
        raise ValueError(f"the template {name} has the fields {sorted(found)}; it needs {sorted(fields)}.")


def verdict(text: str) -> bool | None:
    """What a judge decided, by its lines of that form; None of a reply that has none, or two that differ.

    Example:
        >>> verdict("Fine.\\nVerdict: valid"), verdict("Verdict: INVALID."), verdict("It is valid, I think.")
        (True, False, None)
    """
    found = {match.lower() for match in _VERDICT.findall(text)}
    return None if len(found) != 1 else found == {"valid"}
