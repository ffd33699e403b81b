"""Which settings `bench` measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from snugfit.errors import UserError
from snugfit.records.bench import CellKind

DEFAULT_PREFILL = (512, 1024, 2048, 4096, 8192, 16384, 32768)
DEFAULT_DEPTHS = (128, 4096, 16384)
DEFAULT_CONCURRENCY = (1, 8, 40, 64)
ROUNDS = 2  # requests of each user in a repeat
WARM_UP_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What `bench` was asked for; None for defaults, of which those beyond the server's context are left out.

    `prefill` are prompt lengths; `depths` those of the prompts behind which one user's tokens are timed; `concurrency`
    numbers of users with prompts of `prompt_tokens`. All but prefill ask for `output_tokens`.
    """

    prefill: Sequence[int] | None = None
    depths: Sequence[int] | None = None
    concurrency: Sequence[int] = DEFAULT_CONCURRENCY
    prompt_tokens: int = 1024
    output_tokens: int = 128
    repeats: int = 5


@dataclass(frozen=True)
class Setting:
    """One cell: `users` at a time, prompts of `prompt_tokens`, answers of `output_tokens`."""

    kind: CellKind
    prompt_tokens: int
    output_tokens: int
    users: int = 1

    @property
    def requests(self) -> int:
        """Requests of one repeat."""
        return ROUNDS * self.users if self.kind == "load" else 1


def make_settings(options: BenchOptions, longest: int | None) -> tuple[list[Setting], list[str]]:
    """The cells in order, and remarks on what is left out; `longest`: tokens that a server takes, None if unknown.

    UserError for numbers that no cell can have, and for lengths that were asked for and do not fit.
    """
    if options.prompt_tokens < 1:
        raise _invalid("prompt_tokens", "must be >= 1", options.prompt_tokens)
    if options.output_tokens < 2:
        raise _invalid("output_tokens", "a rate between tokens needs at least 2", options.output_tokens)
    if options.repeats < 1:
        raise _invalid("repeats", "must be >= 1", options.repeats)
    for name in ("prefill", "depths", "concurrency"):
        for value in getattr(options, name) or ():
            if value < 1:
                raise _invalid(name, "must be >= 1", value)
    notes: list[str] = []
    prefill = _fitting("prefill", options.prefill, DEFAULT_PREFILL, 1, longest, notes)
    depths = _fitting("depths", options.depths, DEFAULT_DEPTHS, options.output_tokens, longest, notes)
    settings = [Setting("prefill", tokens, 1) for tokens in prefill]
    settings += [Setting("decode", tokens, options.output_tokens) for tokens in depths]
    if options.concurrency:
        _fitting("prompt_tokens", (options.prompt_tokens,), (), options.output_tokens, longest, notes)
    settings += [
        Setting("load", options.prompt_tokens, options.output_tokens, users)
        for users in dict.fromkeys(options.concurrency)
    ]
    if not settings:
        raise UserError(
            "there is nothing to measure.",
            code="option-missing",
            where="prefill",
            remedy="Give lengths in `prefill` or `depths`, or users in `concurrency`.",
        )
    return settings, notes


def _fitting(
    name: str, asked: Sequence[int] | None, default: Sequence[int], output: int, longest: int | None, notes: list[str]
) -> list[int]:
    wanted = list(dict.fromkeys(default if asked is None else asked))
    too_long = [tokens for tokens in wanted if longest is not None and tokens + output > longest]
    if too_long and asked is not None:
        raise UserError(
            f"{too_long[0]} tokens and {output} of an answer are more than the server's {longest}.",
            code="sequence-too-long",
            where=name,
            remedy=f"Start the server with --max-model-len {too_long[0] + output}, or ask for less.",
        )
    if too_long:
        notes.append(f"the server takes {longest:,} tokens: {name} of {', '.join(map(str, too_long))} is left out")
    return [tokens for tokens in wanted if tokens not in too_long]


def _invalid(name: str, what: str, value: int) -> UserError:
    return UserError(f"{what}, got {value}.", code="option-invalid", where=name)
