"""Benchmark tasks run by lm_eval on a checkpoint or a server, every item's score kept under a stable key.

On a checkpoint all requests become token rows that pass the model one decoder layer at a time, under a named activation
profile: a model larger than the memory is tested with what an engine would do to its activations. Logits exist only at
the positions that are asked about, a few at a time.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from snugfit import __version__, machine
from snugfit.data.tokenizer import load_tokenizer
from snugfit.engines.profiles import DEFAULT_PROFILE
from snugfit.errors import UserError
from snugfit.evaluation import offline_tasks
from snugfit.evaluation.subject import TOKENS_PER_BATCH, Subject, last_states, open_head, open_subject
from snugfit.model import forward_pass
from snugfit.records.evaluation import TaskResult, TasksRecord
from snugfit.storage.staging import staged

PASS_BYTES = 4 << 30  # hidden states in flight; requests with more of them pass through the model in parts
POSITIONS_AT_ONCE = 256  # logits in memory: this many times the vocabulary, in fp32
CONCURRENT = 8  # requests under way at a server
_NUMBERS = (int, float, np.number, np.bool_)


@dataclass(frozen=True)
class TasksRun:
    """What `run_tasks` gives: the record, and what is too long or too loose for it.

    `samples` are the lines of the per-sample log (task, filter, key, doc_id, target, filtered responses, metrics), fit
    for JSON; `reported` lm_eval's own figures by task or group; `left_out` the metrics that have no score by item;
    `nonfinite` the requests with NaN or infinite logits, whose log-likelihood was taken as minus infinity.
    """

    record: TasksRecord
    samples: tuple[Mapping[str, Any], ...]
    reported: Mapping[str, Mapping[str, float]]
    left_out: tuple[str, ...]
    nonfinite: int


def run_tasks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    activations: str = DEFAULT_PROFILE,
    server: str | None = None,
    server_model: str | None = None,
    limit: int | None = None,
    device: str | None = None,
    seed: int = 0,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = False,
    task_folder: Path | None = None,
) -> TasksRun:
    """Run lm_eval tasks on the model directory `model`, or on `server` with that directory's tokenizer.

    `limit` is the number of items a task, `seed` that of few-shot examples, `task_folder` holds further YAML tasks.
    UserError, before the model is run, for a missing extra, unknown tasks, data out of reach, a server that does not
    answer, and on a checkpoint for tasks that generate text.
    """
    _check_extra(server)
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} items is no test.", remedy="Give 1 or more, or no limit.")
    clock = machine.Clock()
    place = machine.pick_device("cpu" if server else device)
    with _quiet(progress):
        with clock("load"):
            if server is None:
                lm = _walk_model(open_subject(model, activations=activations), place, tokens_per_batch, progress)
            else:
                lm = _served_model(Path(model), server, server_model, seed)
            loaded = offline_tasks.load_tasks(tasks, task_folder, seed=seed)
            offline_tasks.check_tasks(loaded["tasks"], generates=server is not None)
        with clock("evaluate"):
            results = _evaluate(lm, loaded, limit, server)
    rows, left_out = _convert(results, loaded["tasks"])
    versions = machine.versions() | {name: importlib.metadata.version(name) for name in ("lm_eval", "datasets")}
    versions |= {f"task {name}": str(version) for name, version in results["versions"].items()}
    arguments = {"tasks": list(tasks), "limit": limit, "seed": seed, "server": server, "server_model": server_model}
    if not server:
        arguments |= {"activations": activations, "device": str(place), "tokens_per_batch": tokens_per_batch}
    record = TasksRecord(__version__, Path(model).resolve().name, arguments, tuple(rows), clock.seconds, versions)
    samples = tuple(_sample(name, line) for name in loaded["tasks"] for line in results["samples"][name])
    return TasksRun(record, samples, _reported(results), tuple(left_out), getattr(lm, "nonfinite", 0))


def write_tasks(run: TasksRun, directory: str | Path) -> None:
    """tasks.json, samples.jsonl, and lm_eval.json with its own figures, in a new directory, whole or not at all."""
    with staged(Path(directory)) as folder:
        lines = "".join(json.dumps(sample) + "\n" for sample in run.samples)
        rest = _plain({"reported": run.reported, "left_out": run.left_out, "nonfinite": run.nonfinite})
        (folder / "tasks.json").write_text(run.record.to_json(), encoding="utf-8")
        (folder / "samples.jsonl").write_text(lines, encoding="utf-8")
        (folder / "lm_eval.json").write_text(json.dumps(rest, indent=2) + "\n", encoding="utf-8")


def _check_extra(server: str | None) -> None:
    for name in ("lm_eval", "tenacity") if server else ("lm_eval",):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"tasks need {name}, which is not installed.", remedy="Run: pip install 'snugfit[eval]'")


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """lm_eval prints and draws bars: stdout stays free for the result, and stderr too unless `progress` is wanted."""
    sink = sys.stderr if progress else io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


def _evaluate(lm: Any, loaded: Mapping[str, Any], limit: int | None, server: str | None) -> Any:
    from lm_eval.evaluator import evaluate

    try:
        return evaluate(lm, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    except Exception as error:
        if server is None or isinstance(error, UserError):
            raise
        line = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"a request failed ({type(error).__name__}: {line}).",
            where=server,
            remedy="It has to serve /v1/completions with token ids as prompt, echo and logprobs, as vLLM does.",
        ) from error


def _walk_model(subject: Subject, device: torch.device, tokens_per_batch: int, progress: bool) -> Any:
    """An lm_eval model that answers by the walk; it tokenizes and truncates as lm_eval's HFLM does."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import resolve_max_length
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokenizer = load_tokenizer(subject.checkpoint.path)
    length = resolve_max_length(subject.skeleton.config, tokenizer)
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    class WalkModel(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
        nonfinite = 0

        @property
        def eot_token_id(self) -> Any:
            return tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            if prefix is None:
                raise UserError("the tokenizer has no token to begin with.", where=str(subject.checkpoint.path))
            return int(prefix)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            if add_special_tokens is None and prefix is not None and string.startswith(tokenizer.decode(prefix)):
                add_special_tokens = False  # the text begins with BOS itself
            special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return list(tokenizer.encode(string, **special))

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            questions = [_question(context, continuation, length) for _, context, continuation in requests]
            answers = _answer(subject, questions, device, tokens_per_batch, progress)
            self.nonfinite += sum(math.isinf(value) for value, _ in answers)
            return answers

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
            windows: list[tuple[None, list[int], list[int]]] = []
            ends = [0]
            for (string,) in (request.args for request in requests):
                pairs = get_rolling_token_windows(self.tok_encode(string), self.prefix_token_id, length, 1)
                windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
                ends.append(len(windows))
            values = [value for value, _ in self._loglikelihood_tokens(windows)]
            return [sum(values[low:high]) for low, high in pairwise(ends)]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
            raise offline_tasks.needs_server(", ".join(sorted({str(request.task_name) for request in requests})))

    return WalkModel()


@dataclass(frozen=True)
class _Question:
    """Token ids to feed, and the ids whose probabilities are asked for, from position `first` of the row on."""

    row: tuple[int, ...]
    first: int
    wanted: tuple[int, ...]


def _question(context: Sequence[int], continuation: Sequence[int], length: int) -> _Question:
    """What to feed to have `continuation` scored: the last token is not fed, and the left end goes where it is long."""
    if not context or not 0 < len(continuation) <= length:
        raise UserError(
            f"a continuation of {len(continuation)} tokens behind {len(context)} cannot be scored.",
            remedy=f"Both need a token, and the model takes {length}.",
        )
    row = (*context, *continuation)[-(length + 1) : -1]
    return _Question(row, len(row) - len(continuation), tuple(continuation))


def _share_rows(questions: Sequence[_Question]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Rows to feed, and for each question the one that answers it: a row that begins another is read off that one."""
    rows: list[tuple[int, ...]] = []
    homes: dict[tuple[int, ...], int] = {}
    # in lexicographic order the rows that a row begins stand right behind it
    for row in sorted({question.row for question in questions}, reverse=True):
        if not rows or rows[-1][: len(row)] != row:
            rows.append(row)
        homes[row] = len(rows) - 1
    return rows, [homes[question.row] for question in questions]


def _passes(rows: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Row numbers, longest rows first, in parts of at most `tokens` padded tokens (or one row)."""
    parts: list[list[int]] = []
    room = 0
    for row in sorted(range(len(rows)), key=lambda r: -len(rows[r])):
        width = -(-len(rows[row]) // forward_pass.ROW_MULTIPLE) * forward_pass.ROW_MULTIPLE
        if not parts or room < width:
            parts.append([])
            room = tokens
        parts[-1].append(row)
        room -= width
    return parts


def _answer(
    subject: Subject, questions: Sequence[_Question], device: torch.device, tokens_per_batch: int, progress: bool
) -> list[tuple[float, bool]]:
    """For each question its log-probability (nats, minus infinity where logits are not finite), and is it greedy."""
    rows, homes = _share_rows(questions)
    asked: list[list[int]] = [[] for _ in rows]
    for number, home in enumerate(homes):
        asked[home].append(number)
    embedding = subject.skeleton.model.get_input_embeddings().weight  # type: ignore[operator]
    parts = _passes(rows, PASS_BYTES // (embedding.shape[1] * embedding.element_size()))
    totals, hits = np.zeros(len(questions)), np.zeros(len(questions), dtype=np.int64)
    with machine.progress_bar(progress, len(parts) * len(subject.skeleton.layers), "layers") as step:
        for part in parts:
            places, asks = _lay_out(part, asked, questions)
            fed = [rows[row] for row in part]
            states = last_states(subject, fed, places, device, tokens_per_batch=tokens_per_batch, tick=step)
            _score(torch.cat(states), asks, open_head(subject, device), device, totals, hits)
    finite = np.isfinite(totals)
    return [
        (float(total) if fine else -math.inf, bool(fine and hit == len(question.wanted)))
        for total, hit, fine, question in zip(totals, hits, finite, questions, strict=True)
    ]


def _lay_out(
    part: Sequence[int], asked: Sequence[Sequence[int]], questions: Sequence[_Question]
) -> tuple[list[torch.Tensor], np.ndarray[Any, Any]]:
    """The places wanted of each row, and [asks, 3]: index in all places together (ascending), token id, question."""
    places: list[torch.Tensor] = []
    asks: list[tuple[int, int, int]] = []
    before = 0
    for row in part:
        spots = sorted({questions[n].first + k for n in asked[row] for k in range(len(questions[n].wanted))})
        index = {spot: before + k for k, spot in enumerate(spots)}
        for number in asked[row]:
            question = questions[number]
            asks += [(index[question.first + k], token, number) for k, token in enumerate(question.wanted)]
        places.append(torch.tensor(spots))
        before += len(spots)
    return places, np.asarray(sorted(asks), dtype=np.int64)


def _score(
    states: torch.Tensor,
    asks: np.ndarray[Any, Any],
    head: forward_pass.Head,
    device: torch.device,
    totals: np.ndarray[Any, Any],
    hits: np.ndarray[Any, Any],
) -> None:
    """Add every asked token's log-probability (fp32) to its question's total, and whether it was the likeliest."""
    for low in range(0, len(states), POSITIONS_AT_ONCE):
        logits = head(states[None, low : low + POSITIONS_AT_ONCE].to(device))[0].float()
        first, last = np.searchsorted(asks[:, 0], (low, low + POSITIONS_AT_ONCE))
        at = torch.from_numpy(asks[first:last, 0] - low).to(device)
        wanted = torch.from_numpy(asks[first:last, 1].copy()).to(device)
        chosen = logits[at, wanted] - logits.logsumexp(-1)[at]
        owners = asks[first:last, 2]
        np.add.at(totals, owners, chosen.double().cpu().numpy())
        np.add.at(hits, owners, (logits.argmax(-1)[at] == wanted).cpu().numpy())


def _served_model(directory: Path, url: str, name: str | None, seed: int) -> Any:
    """lm_eval's local-completions on a server that has the model; `directory` has its tokenizer."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.models.utils import resolve_max_length
    from transformers import AutoConfig

    from snugfit.serving.client import connect

    tokenizer = load_tokenizer(directory)
    config = AutoConfig.from_pretrained(directory) if (directory / "config.json").is_file() else None
    with connect(url, model=name) as server:
        key = server.client.headers.get("Authorization")
        return LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model=server.model,
            tokenizer=str(directory),
            tokenizer_backend="huggingface",
            tokenized_requests=True,
            # begins a text as the tokenizer does; lm_eval's own default is no BOS for servers
            add_bos_token=tokenizer("a").input_ids != tokenizer("a", add_special_tokens=False).input_ids,
            max_length=min(server.max_model_len or sys.maxsize, resolve_max_length(config, tokenizer)),
            num_concurrent=CONCURRENT,
            seed=seed,
            # without a header of ours it would send OPENAI_API_KEY to any server
            header={"User-Agent": "snugfit"} | ({"Authorization": key} if key else {}),
        )


def _convert(results: Any, tasks: Mapping[str, Any]) -> tuple[list[TaskResult], list[str]]:
    """A row for each metric with a score by item, and the names of the metrics that have none."""
    rows: dict[tuple[str, str], TaskResult] = {}
    left_out: list[str] = []
    for name, task in tasks.items():
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for line in results["samples"][name]:
            for metric in line["metrics"]:
                found.setdefault((metric, line["filter"]), {})[_key(line)] = line[metric]
        for (metric, chosen), values in found.items():
            suffix = "" if chosen == "none" else f",{chosen}"
            row = _row(name, task, metric, suffix, values)
            if row is None:
                left_out.append(f"{name}: {metric}{suffix}")
            else:
                rows.setdefault((name, row.metric), row)
    return list(rows.values()), left_out


def _key(line: Mapping[str, Any]) -> str:
    return f"{line['doc_id']}:{line['doc_hash'][:12]}"


def _row(name: str, task: Any, metric: str, suffix: str, values: Mapping[str, Any]) -> TaskResult | None:
    """One metric with every item's score; None where what lm_eval reports is no mean over items."""
    from lm_eval.api import metrics

    aggregate = task.aggregation().get(metric, metrics.mean)
    higher_is_better, kind = bool(task.higher_is_better().get(metric, True)), "mean"
    if aggregate in (metrics.perplexity, metrics.weighted_perplexity, metrics.bits_per_byte):
        # an exponential or a ratio over all items; what goes into it is each item's log-likelihood
        metric, higher_is_better = "loss", False
        items = {key: -float(value[0] if isinstance(value, tuple) else value) for key, value in values.items()}
    elif aggregate in (metrics.mean, metrics.nanmean) and all(isinstance(v, _NUMBERS) for v in values.values()):
        drop = aggregate is metrics.nanmean
        items = {key: float(value) for key, value in values.items() if not (drop and math.isnan(value))}
        kind = "accuracy" if not drop and set(items.values()) <= {0.0, 1.0} else "mean"
    else:
        return None
    scores = list(items.values())
    if not scores:
        return None
    error = float(metrics.mean_stderr(scores)) if len(scores) > 1 else None
    return TaskResult(name, metric + suffix, kind, higher_is_better, float(metrics.mean(scores)), error, items)


def _sample(name: str, line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the per-sample log."""
    entry = {"task": name, "filter": line["filter"], "key": _key(line)}
    entry |= {part: line[part] for part in ("doc_id", "target", "filtered_resps")}
    entry["metrics"] = {metric: line[metric] for metric in line["metrics"]}
    return _plain(entry)


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    """`entry` as JSON has it, None for NaN and infinities."""
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(entry, default=handle_non_serializable)
    plain: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return plain


def _reported(results: Any) -> dict[str, dict[str, float]]:
    """lm_eval's table: metric,filter -> figure, by task and group."""
    return {
        name: {key: float(v) for key, v in row.items() if "," in key and isinstance(v, _NUMBERS)}
        for name, row in results["results"].items()
    }
