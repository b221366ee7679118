"""Requests over time: drawn from a seed, or read from a CSV of the Azure or BurstGPT form.

Azure LLM inference traces 2023 and 2024 (github.com/Azure/AzurePublicDataset, AzureLLMInferenceDataset2024.md) have the
columns `TIMESTAMP,ContextTokens,GeneratedTokens`; a time is `2023-11-16 18:15:46.6805900` or
`2024-05-10 00:00:00.009930+00:00`. They name no model. BurstGPT (github.com/HPMLL/BurstGPT) has
`Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type`, later files `Session ID` and `Elapsed time` as
well; a time is in seconds; a request that failed has 0 response tokens.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from swap_agent.errors import InvalidUsage

BURST_S = 60.0
"""Mean length of a burst of one model."""
BURST_SHARE = 0.1
"""Part of the time that a model spends in bursts."""
_PROMPT = (1000.0, 0.8, 8192)
"""Log-normal: median, sigma, largest. Assumed, of the size of a conversation with history."""
_OUTPUT = (130.0, 0.8, 1024)


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival, as columns; `model` is a place in `models`."""

    models: tuple[str, ...]
    arrival_s: npt.NDArray[np.float64]
    model: npt.NDArray[np.int64]
    prompt_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]
    left_out: int = 0
    """Rows of the file without an output, which failed where they were recorded."""
    source: str = "given"

    @classmethod
    def of(cls, models: Sequence[str], requests: Iterable[tuple[float, str, int, int]]) -> Trace:
        """From (arrival in seconds, model, prompt tokens, output tokens)."""
        places = {name: place for place, name in enumerate(models)}
        rows = [(arrival, places[model], prompt, output) for arrival, model, prompt, output in requests]
        rows.sort(key=lambda row: row[0])
        return cls(
            models=tuple(models),
            arrival_s=np.array([row[0] for row in rows], dtype=np.float64),
            model=np.array([row[1] for row in rows], dtype=np.int64),
            prompt_tokens=np.array([row[2] for row in rows], dtype=np.int64),
            output_tokens=np.array([row[3] for row in rows], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.arrival_s)

    def counts(self) -> dict[str, int]:
        """Requests of each model."""
        return dict(zip(self.models, np.bincount(self.model, minlength=len(self.models)).tolist(), strict=True))


@dataclass(frozen=True)
class TraceSpec:
    """What to draw. Each model has Poisson arrivals and bursts of its own, in which they come `burst` times faster."""

    seed: int = 1
    hours: float = 1.0
    per_s: float = 10.0
    """Requests of all models together, on average."""
    zipf: float = 1.0
    """The model at place n gets a share proportional to n ** -zipf."""
    burst: float = 10.0
    daily: float = 0.0
    """0…1: how far the rate swings around its mean over 24 hours, lowest at the start."""


def draw(spec: TraceSpec, models: Sequence[str]) -> Trace:
    """The same spec and models give the same trace (NumPy's PCG64). Which model is how popular is drawn as well."""
    rng = np.random.default_rng(spec.seed)
    span_s = spec.hours * 3600
    shares = zipf_shares(spec.zipf, len(models))
    arrivals, places = [], []
    for place, share in zip(rng.permutation(len(models)), shares, strict=True):
        times = _arrivals(rng, spec, share * spec.per_s, span_s)
        arrivals.append(times)
        places.append(np.full(len(times), place, dtype=np.int64))
    arrival_s, model = np.concatenate(arrivals), np.concatenate(places)
    order = np.argsort(arrival_s, kind="stable")
    count = len(order)
    return Trace(
        models=tuple(models),
        arrival_s=arrival_s[order],
        model=model[order],
        prompt_tokens=_tokens(rng, count, *_PROMPT),
        output_tokens=_tokens(rng, count, *_OUTPUT),
        source=f"seed {spec.seed}, Zipf {spec.zipf:.3g}, bursts {spec.burst:.3g}x",
    )


def drawn_between(seed: int, zipf: tuple[float, float], burst: tuple[float, float]) -> tuple[float, float]:
    """A Zipf exponent and a burst factor from their ranges: the former evenly, the latter so that each octave is."""
    rng = np.random.default_rng((seed, 1))
    exponent = rng.uniform(*zipf)
    return float(exponent), float(burst[0] * (burst[1] / burst[0]) ** rng.random())


def zipf_shares(exponent: float, count: int) -> npt.NDArray[np.float64]:
    """Shares of `count` models, the most popular first; their sum is 1."""
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    shares: npt.NDArray[np.float64] = weights / weights.sum()
    return shares


def _arrivals(rng: np.random.Generator, spec: TraceSpec, per_s: float, span_s: float) -> npt.NDArray[np.float64]:
    """Quiet times and bursts in turn, exponentially long; the mean rate is `per_s` whatever `spec.burst` is."""
    quiet_per_s = per_s / (1 - BURST_SHARE + BURST_SHARE * spec.burst)
    quiet_s = BURST_S * (1 - BURST_SHARE) / BURST_SHARE
    lengths: list[float] = []
    total_s, bursting = 0.0, bool(rng.random() < BURST_SHARE)
    starts_bursting = bursting
    while total_s < span_s:
        lengths.append(float(rng.exponential(BURST_S if bursting else quiet_s)))
        total_s += lengths[-1]
        bursting = not bursting
    length_s = np.array(lengths)
    start_s = np.concatenate(([0.0], np.cumsum(length_s)[:-1]))
    in_burst = (np.arange(len(lengths)) % 2 == 0) == starts_bursting
    rates = quiet_per_s * np.where(in_burst, spec.burst, 1.0) * (1 + spec.daily)
    counts = rng.poisson(rates * length_s)
    times = np.repeat(start_s, counts) + rng.random(int(counts.sum())) * np.repeat(length_s, counts)
    if spec.daily:
        kept = (1 - spec.daily * np.cos(times * (2 * math.pi / 86400))) / (1 + spec.daily)
        times = times[rng.random(len(times)) < kept]
    return np.sort(times[times < span_s])


def _tokens(rng: np.random.Generator, count: int, median: float, sigma: float, largest: int) -> npt.NDArray[np.int64]:
    drawn = np.rint(rng.lognormal(math.log(median), sigma, count))
    tokens: npt.NDArray[np.int64] = np.clip(drawn, 1, largest).astype(np.int64)
    return tokens


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    time: str
    prompt: str
    output: str
    model: str
    """Column; empty: the form names no model."""
    parse_time: Callable[[str], float]


def _moment(text: str) -> float:
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


_FORMS = (
    _Form("TIMESTAMP", "ContextTokens", "GeneratedTokens", "", _moment),
    _Form("Timestamp", "Request tokens", "Response tokens", "Model", float),
)


def read(path: Path, models: Sequence[str], seed: int, zipf: float, limit: int | None = None) -> Trace:
    """The requests of a CSV, the first one at 0 s; no more than `limit` of them.

    Where its models are the cluster's, they are kept; where none is, and where the form names none, models are drawn
    from `seed` with Zipf popularity, each request by itself. Raises InvalidUsage naming file, line and column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            times, named, prompts, outputs, lines, left_out = _rows(path, csv.reader(file), limit)
    except OSError as error:
        raise InvalidUsage(f"--trace {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidUsage(f"--trace {path} is no CSV text: {error}") from error
    if not times:
        raise InvalidUsage(f"--trace {path} has no requests")
    places = {name: place for place, name in enumerate(models)}
    known = [name in places for name in named]
    if named and all(known):
        model = np.array([places[name] for name in named], dtype=np.int64)
        models_from = "its own models"
    elif any(known):
        wrong = known.index(False)
        raise InvalidUsage(
            f"--trace {path}, line {lines[wrong]}, Model: {named[wrong]!r} is no model of the cluster, others are; "
            "describe it with --cluster"
        )
    else:
        rng = np.random.default_rng(seed)
        popular = rng.permutation(len(models))
        model = popular[rng.choice(len(models), size=len(times), p=zipf_shares(zipf, len(models)))].astype(np.int64)
        models_from = f"models by Zipf {zipf:.3g}, seed {seed}"
    arrival_s = np.array(times) - min(times)
    order = np.argsort(arrival_s, kind="stable")
    return Trace(
        models=tuple(models),
        arrival_s=arrival_s[order],
        model=model[order],
        prompt_tokens=np.array(prompts, dtype=np.int64)[order],
        output_tokens=np.array(outputs, dtype=np.int64)[order],
        left_out=left_out,
        source=f"{path}, {models_from}",
    )


def _rows(
    path: Path, reader: Iterable[list[str]], limit: int | None
) -> tuple[list[float], list[str], list[int], list[int], list[int], int]:
    rows = iter(reader)
    header = [column.strip() for column in next(rows, [])]
    form = next((form for form in _FORMS if {form.time, form.prompt, form.output} <= set(header)), None)
    if form is None or (form.model and form.model not in header):
        forms = " or ".join(
            ",".join(filter(None, (form.time, form.model, form.prompt, form.output))) for form in _FORMS
        )
        raise InvalidUsage(f"--trace {path}, line 1: the columns {forms} are expected, not {','.join(header)!r}")
    at = {column: header.index(column) for column in (form.time, form.prompt, form.output)}
    model_at = header.index(form.model) if form.model else None
    times: list[float] = []
    named: list[str] = []
    prompts: list[int] = []
    outputs: list[int] = []
    lines: list[int] = []
    left_out = 0
    for line, row in enumerate(rows, 2):
        if not row:
            continue
        if len(row) != len(header):
            raise InvalidUsage(
                f"--trace {path}, line {line}: {len(row)} columns where the first line has {len(header)}"
            )
        column = form.time
        try:
            time_s = form.parse_time(row[at[column]].strip())
            if not math.isfinite(time_s):
                raise ValueError
            column = form.prompt
            prompt = _count(row[at[column]])
            column = form.output
            output = _count(row[at[column]])
        except ValueError as error:
            what = "a time" if column == form.time else "a count of tokens"
            raise InvalidUsage(f"--trace {path}, line {line}, {column}: {row[at[column]]!r} is not {what}") from error
        if output == 0:
            left_out += 1
            continue
        times.append(time_s)
        prompts.append(prompt)
        outputs.append(output)
        lines.append(line)
        if model_at is not None:
            named.append(row[model_at].strip())
        if limit is not None and len(times) >= limit:
            break
    return times, named, prompts, outputs, lines, left_out


def _count(text: str) -> int:
    count = int(text)
    if not 0 <= count < 1 << 31:
        raise ValueError
    return count
