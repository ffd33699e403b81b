"""A comparison as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from helpers.results import SHARED, evals, model, shifted, task, two_tasks, write_tasks
from snugfit.evaluation.compare import compare
from snugfit.report.comparison import comparison_csv, comparison_markdown

TASKS_TABLE = r"""
| task | metric | A: nvfp4 | B: hybrid\|v_2\_ | A - B | 95 % interval | items | only A / only B right
 | p | p (Holm) | z, unpaired |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| hellaswag | acc | 52.50% | **65.00%** | -12.50 pp | [-18.08, -6.92] | 200 | 5 / 30 | < 0.001 | < 0.001 | -2.55 |
| lambada | loss | 1.9904 | 2.0178 | -0.0274 | [-0.1826, +0.1277] | 40 |  | 0.714 | 0.714 | -0.09 |

A minus B, paired on 240 items: McNemar's exact test for accuracies (pp: percentage points), a studentized bootstrap
 over items for other scores and for every interval. **Bold**: the better side, where p < 0.05 after Holm's correction
 for 2 tests. z is what the reported errors would say of unpaired scores, for reference.
"""
LOSSES_TABLE = r"""
| context | figure | A: x | B: y | A - B | 95 % interval | perplexity A | perplexity B | ratio A / B | chunks
 | p | p (Holm) | more tokens |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| 512 | loss | 2.24091 | 2.22727 | +0.01364 | [-0.03863, +0.06590] | 9.4019 | 9.2745 | 1.0137 | 6
 | 0.548 | 0.548 | 425 |
|  | KL | 0.12273 | 0.10455 |  |  |  |  |  | 6 |  |  |  |

A minus B in nats a token, paired on 6 chunks: a studentized bootstrap over chunks. **Bold**: the better side, where p <
 0.05 after Holm's correction for 1 test. More tokens: how many would make p < 0.05 four times in five, were the
 difference what it seems; settled: it is below already.

- 512, KL: a lower bound in one, not in the other; not paired.
"""


def as_written(table: str) -> str:
    """A table of this file with its folded lines (they begin with a space) put together again."""
    return table.lstrip("\n").replace("\n ", " ")


def test_tasks_in_markdown(tmp_path: Path) -> None:
    """Names are escaped, the significantly better value is bold, the test is named below."""
    assert comparison_markdown(compare(*two_tasks(tmp_path))) == as_written(TASKS_TABLE)


def test_losses_in_markdown(tmp_path: Path) -> None:
    """Losses with perplexities and their ratio, KL below them, and a remark on what was not paired."""
    a = model("x", shifted(0.5, 0.25, 0.4), kl=[0.5, 0.4, 0.6, 0.5, 0.5, 0.2], kl_kind="lower bound")
    b = model("y", shifted(0.5, 0.125, 0.45, 0.3), kl=[0.4, 0.4, 0.5, 0.5, 0.4, 0.1])
    assert comparison_markdown(compare(*evals(tmp_path, [a], [b]))) == as_written(LOSSES_TABLE)


def test_what_is_settled_and_what_does_not_differ(tmp_path: Path) -> None:
    """A clear difference needs no more tokens and says so; where nothing differs there is no interval of no width."""
    a = model("x", shifted(2.0, 2.25, 1.875), kl=[0.5] * 6)
    b = model("y", SHARED, kl=[0.5] * 6)
    loss, kl = comparison_markdown(compare(*evals(tmp_path, [a], [b]))).splitlines()[2:4]
    assert loss.endswith("| settled |")
    assert "| no difference |" in kl
    assert kl.endswith("| 1.000 | 1.000 |  |")


def test_names_are_one_line_of_markdown(tmp_path: Path) -> None:
    """Bars, stars, underscores at a word's edge and line ends in names cannot break the table."""
    name = "a|b\n*c* `d` <e> [f](g) _h_ i_j \\"
    pair = [write_tasks(tmp_path / f"{side}.json", task(name, [1.0, 0.0] * 3), model=name) for side in "ab"]
    shown = comparison_markdown(compare(*pair))
    escaped = r"a\|b \*c\* \`d\` \<e\> \[f\](g) \_h\_ i_j \\"
    assert f"| A: {escaped} | B: {escaped} |" in shown
    assert f"\n| {escaped} | acc |" in shown


def test_csv_has_a_row_a_comparison_in_full_precision(tmp_path: Path) -> None:
    """Every row has every column; numbers read back as they were."""
    record = compare(*two_tasks(tmp_path))
    rows = list(csv.DictReader(io.StringIO(comparison_csv(record))))
    assert [row["name"] for row in rows] == ["hellaswag", "lambada"]
    for row, source in zip(rows, record.tasks, strict=True):
        assert row["family"] == "tasks"
        assert int(row["count"]) == source.items
        for column in ("a", "b", "difference", "low", "high", "p", "p_holm", "z"):
            assert float(row[column]) == getattr(source, column)
    assert (rows[0]["only_a"], rows[1]["only_a"], rows[0]["perplexity_a"]) == ("5", "", "")


def test_csv_of_losses(tmp_path: Path) -> None:
    """Rows of losses carry context, figure, chunks, tokens and perplexities in the same columns."""
    record = compare(*evals(tmp_path, [model("x", shifted(0.5, 0.25))], [model("y", shifted(0.5, 0.125))]))
    row = next(csv.DictReader(io.StringIO(comparison_csv(record))))
    assert (row["family"], row["name"], row["metric"], row["count"], row["tokens"]) == (
        "losses",
        "512",
        "loss",
        "6",
        "22",
    )
    assert float(row["perplexity_ratio"]) == record.losses[0].perplexity_ratio
    assert int(row["more_tokens"]) == record.losses[0].more_tokens
