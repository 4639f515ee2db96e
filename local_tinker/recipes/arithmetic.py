"""A task with a verifiable answer, made on the spot."""

from __future__ import annotations

import random

from ..data.rows import Row, Rows, RowSource


def arithmetic(count: int, seed: int) -> Rows:
    """Sums and differences of small numbers: `{"prompt": [...], "answer": "12"}`."""
    draw, rows = random.Random(f"arithmetic {seed}"), []
    for number in range(1, count + 1):
        a, b = draw.randint(1, 9), draw.randint(1, 9)
        question, answer = (f"{a} + {b}", a + b) if draw.random() < 0.5 else (f"{max(a, b)} - {min(a, b)}", abs(a - b))
        content = f"What is {question}? Answer with the number only."
        row = {"prompt": [{"role": "user", "content": content}], "answer": str(answer)}
        rows.append(Row(row, source=RowSource("arithmetic", number)))
    return Rows(rows, name="arithmetic")
