"""Overlap of two answers, word by word."""


def rouge_l(answer: str, truth: str) -> float:
    """F1 of the longest common subsequence of words."""
    left, right = answer.split(), truth.split()
    row = [0] * (len(right) + 1)
    for word in left:
        above, row = row, [0]
        for column, other in enumerate(right):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[column]))
    return 2 * row[-1] / (len(left) + len(right)) if row[-1] else 0.0
